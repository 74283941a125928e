"""`swarmcpp cache`: what prefixes are stored on this machine, and their care."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from swarmcpp.commands import terminal
from swarmcpp.config import LoadedConfig
from swarmcpp.errors import StartupError
from swarmcpp.kv.arena import Arena, read_header, read_label
from swarmcpp.kv.cache import verify


def _arenas(loaded: LoadedConfig) -> list[Path]:
    return sorted((loaded.config.storage.data_dir / "arena").glob("*.arena"))


def ls(loaded: LoadedConfig, *, as_json: bool) -> None:
    """List the arenas: of which model, how full, how much disk."""
    rows = []
    for path in _arenas(loaded):
        known = read_header(path)
        try:
            stat = path.stat()
        except OSError:
            # It went while it was looked at, or is a link to nothing.
            continue
        rows.append(
            {
                "file": path.name,
                "model": read_label(path),
                "blocks": Arena.count(path, known[0]) if known else None,
                "capacity": known[0].n_blocks if known else None,
                "block_bytes": known[0].block_bytes if known else None,
                # Sparse files use less than their size; systems that do not tell count the size.
                "disk_bytes": getattr(stat, "st_blocks", stat.st_size // 512) * 512,
            }
        )
    if as_json:
        terminal.print_json(rows)
        return
    table = Table("file", "model", "blocks", "on disk")
    for row in rows:
        full = "not readable" if row["blocks"] is None else f"{row['blocks']} of {row['capacity']}"
        table.add_row(str(row["file"]), str(row["model"]), full, terminal.size_text(int(str(row["disk_bytes"]))))
    terminal.stdout().print(table if rows else "no cached prefixes")


def clear(loaded: LoadedConfig) -> None:
    """Remove every arena that no node uses. Raises StartupError when one is in use."""
    removed = 0
    busy: list[str] = []
    for path in _arenas(loaded):
        try:
            gone = Arena.remove(path)
        except OSError as error:
            raise StartupError(f"{path}: cannot be removed ({error.strerror}); check its directory's rights") from error
        if not gone:
            busy.append(path.name)
            continue
        removed += 1
    terminal.stdout().print(f"removed {removed} arena{'' if removed == 1 else 's'}")
    if busy:
        raise StartupError(f"{', '.join(busy)}: in use by a running swarmcpp; stop it first")


def check(loaded: LoadedConfig) -> None:
    """Read every block and drop what is damaged. Raises StartupError when an arena is in use or is none."""
    for path in _arenas(loaded):
        try:
            arena = Arena.open_file(path)
        except OSError as error:
            raise StartupError(str(error)) from error
        if arena is None:
            raise StartupError(f"{path.name}: in use by a running swarmcpp; stop it first")
        try:
            sound, erased = verify(arena)
        finally:
            arena.close()
        terminal.stdout().print(f"{path.name}: {sound} blocks are sound, {erased} were dropped")
