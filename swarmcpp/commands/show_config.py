"""`swarmcpp config`: every value and where it came from."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from swarmcpp.commands import terminal
from swarmcpp.config import Config, LoadedConfig
from swarmcpp.settings import describe


def run(loaded: LoadedConfig, *, as_json: bool) -> None:
    """Print the configuration; the API key is masked."""
    shown = loaded.shown()
    if as_json:
        terminal.print_json({key: {"value": value, "source": loaded.sources[key]} for key, value in shown.items()})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", no_wrap=True)
    for title in ("value", "from", "meaning"):
        table.add_column(title, overflow="fold")
    for described in describe(Config):
        value, source = shown[described.key], loaded.sources[described.key]
        limit = f" ({described.limit})" if described.limit and "number" in described.kind else ""
        style = "" if source == "default" else "bold"
        table.add_row(
            Text(described.key, style),
            Text(_text(value), style),
            Text(source, style),
            Text(described.help + limit, "dim"),
        )
    terminal.stdout().print(table)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(str(each) for each in value) or "(none)"
    return "(none)" if value is None else str(value)
