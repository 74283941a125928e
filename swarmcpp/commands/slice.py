"""`swarmcpp slice`: the GGUF of a layer range."""

from __future__ import annotations

from pathlib import Path

from swarmcpp.commands import terminal
from swarmcpp.models.inspect import inspect
from swarmcpp.models.manifest import manifest_of
from swarmcpp.models.slicing import check_sliceable, write_slice


def run(source: Path, first: int, last: int, target: Path, data_dir: Path) -> None:
    """Write the slice and say what it is. Raises what write_slice does."""
    model = inspect(source)
    # Before the fingerprint, which takes seconds for a large model.
    check_sliceable(model, first, last)
    fingerprint = manifest_of(model.files, data_dir).fingerprint
    write_slice(source, first, last, target, fingerprint=fingerprint)
    size = terminal.size_text(target.stat().st_size)
    terminal.stdout().print(f"{target}: layers {first} to {last} of {model.n_layers} of {model.name}, {size}")
