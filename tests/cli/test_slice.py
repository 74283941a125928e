"""`swarmcpp slice`, as a program."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli_process import DEADLINE_S, PROGRAM, swarmcpp

from swarmcpp.llama.context import Model
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.manifest import manifest_of
from swarmcpp.models.slicing import slice_of
from swarmcpp.models.synthetic import Shape, write_model

SHAPE = Shape("random", "llama", 4, 256, 4, 2, 1024, 512, 2048)


@pytest.fixture
def model(home: Path) -> Path:
    return write_model(home / "model.gguf", SHAPE, quant="F16")


def left(home: Path) -> set[str]:
    return {path.name for path in home.iterdir() if path.is_file()}


def test_a_slice_is_a_model_that_loads(model: Path, home: Path) -> None:
    done = swarmcpp("slice", "model.gguf", "1", "3", "middle.gguf")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "middle.gguf: layers 1 to 3 of 4 of random, 3.9 MB\n"
    found = slice_of(read_header(home / "middle.gguf"))
    assert found is not None
    assert (found.first, found.last, found.n_layers, found.is_tail) == (1, 3, 4, False)
    assert found.fingerprint == manifest_of([model], home / "memo").fingerprint
    loaded = Model(home / "middle.gguf", use_extra_bufts=False)
    assert loaded.vocab.n_vocab == 1
    loaded.close()
    assert left(home) == {"model.gguf", "middle.gguf"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("model.gguf", "3", "2", "out.gguf"), "needs 0 <= A < B <= 4"),
        (("model.gguf", "0", "5", "out.gguf"), "needs 0 <= A < B <= 4"),
        (("none.gguf", "0", "2", "out.gguf"), "none.gguf: no such file"),
        (
            ("model.gguf", "0", "2", "none/out.gguf"),
            "none/out.gguf: cannot write the slice (No such file or directory)",
        ),
        (("model.gguf", "0", "2", "model.gguf"), "model.gguf: is the model itself"),
    ],
)
def test_what_cannot_be_is_one_line(model: Path, home: Path, arguments: tuple[str, ...], says: str) -> None:
    done = swarmcpp("slice", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert left(home) == {"model.gguf"}


def test_a_disk_that_is_full(model: Path, home: Path) -> None:
    """A limit on the size of files fails the same call at the same place."""
    command = f'ulimit -f 1000; exec "{PROGRAM[0]}" -m swarmcpp slice model.gguf 0 3 out.gguf'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out.gguf: cannot write the slice (File too large)")
    assert done.stderr.count("\n") == 1
    assert left(home) == {"model.gguf"}
