"""`swarmcpp models`: the catalogue, and what of it is on this disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from swarmcpp.commands import terminal
from swarmcpp.commands.pull import user_catalogue
from swarmcpp.config import StorageConfig
from swarmcpp.models import embedded
from swarmcpp.models.catalogue import CatalogueEntry
from swarmcpp.models.partial import PartialFile


def run(storage: StorageConfig, *, as_json: bool) -> None:
    """Print the catalogue as a table or as JSON. Raises BadConfig when the user's own models.toml is wrong."""
    entries = user_catalogue(storage).entries
    if as_json:
        terminal.print_json(
            [asdict(entry) | {"downloaded": _local(entry, storage.models_dir) == "yes"} for entry in entries]
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("model")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("licence")
    table.add_column("downloaded", no_wrap=True)
    guide = embedded.embedded_file()
    size = terminal.size_text(guide.stat().st_size)
    table.add_row(embedded.GUIDE, "what serve takes without a name Q8_0", size, "2048", "MIT", "comes with swarmcpp")
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.title} {entry.quant}",
            terminal.size_text(entry.size_hint),
            str(entry.context),
            entry.licence,
            _local(entry, storage.models_dir),
        )
    terminal.stdout().print(table)


def _local(entry: CatalogueEntry, models_dir: Path) -> str:
    """How much of the entry is here: "yes", the size of its part, or nothing."""
    final = models_dir / entry.file
    if final.is_file():
        return "yes"
    part = PartialFile(final).size
    return f"{terminal.size_text(part)} of it" if part else ""
