"""`swarmcpp pull`: download a model of the catalogue, with progress."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from swarmcpp.commands import terminal
from swarmcpp.config import StorageConfig
from swarmcpp.models.catalogue import Catalogue, CatalogueEntry, load_catalogue
from swarmcpp.models.download import PullProgress, pull
from swarmcpp.models.partial import PartialFile


def run(name: str, storage: StorageConfig) -> None:
    """Download the model and print its path. Raises StartupError; Ctrl-C leaves the part for the next time."""
    entry = user_catalogue(storage).find(name)
    path = storage.models_dir / entry.file
    if not path.is_file():
        path = download(entry, storage.models_dir, terminal.stderr())
    terminal.stdout().print(str(path), soft_wrap=True)


def user_catalogue(storage: StorageConfig) -> Catalogue:
    """The built-in catalogue with models.toml of the data directory. Raises BadConfig."""
    return load_catalogue(storage.catalogue_file)


def download(entry: CatalogueEntry, directory: Path, console: Console) -> Path:
    """Download `entry` into `directory`, showing progress on `console`, and return the file.

    Raises DownloadFailed, and KeyboardInterrupt after a note on how to go on.
    """
    try:
        return asyncio.run(download_async(entry, directory, console))
    except KeyboardInterrupt:
        part = PartialFile(directory / entry.file)
        if part.size:
            console.print(
                f"stopped; {terminal.size_text(part.size)} stay in {part.path}: the same command goes on from there",
                soft_wrap=True,
            )
        raise


async def download_async(entry: CatalogueEntry, directory: Path, console: Console) -> Path:
    """As `download`, on a running event loop."""
    part = PartialFile(directory / entry.file)
    resumed = f", {terminal.size_text(part.size)} of it already here" if part.size else ""
    size = terminal.size_text(entry.size_hint)
    console.print(f"downloading {entry.title}, about {size}{resumed}, licence {entry.licence}", soft_wrap=True)
    console.print(f"from {entry.url}\nto {part.final}", style="dim", soft_wrap=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("connecting", total=None)

        def show(now: PullProgress) -> None:
            progress.update(task, completed=now.done, total=now.total, description=progress_text(now))

        return await pull(entry, directory, progress=show)


def progress_text(now: PullProgress) -> str:
    """What is done, how fast it goes, and how long the rest will take at that speed."""
    if now.verifying:
        return "checking SHA-256"
    done = terminal.size_text(now.done)
    if now.total is None:
        return f"{done}, {terminal.size_text(int(now.bytes_per_s))}/s"
    text = f"{done} of {terminal.size_text(now.total)}, {terminal.size_text(int(now.bytes_per_s))}/s"
    if now.bytes_per_s <= 0:
        return text
    left = round((now.total - now.done) / now.bytes_per_s)
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    return f"{text}, {hours}:{minutes:02}:{seconds:02} left" if hours else f"{text}, {minutes}:{seconds:02} left"
