"""Pages of a mapped file that are given back."""

from __future__ import annotations

import mmap
import os
import re
import sys
from pathlib import Path

import pytest

from swarmcpp.llama.context import Context, ContextOptions, Model
from swarmcpp.llama.probe import probe
from swarmcpp.llama.residency import forget_pages, take_out
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.synthetic import TINY, Shape, write_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident(path: Path) -> int:
    """Bytes of a file's mappings in this process that are resident."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    path, data = tmp_path / "file with a space", bytes(range(256)) * 8192
    path.write_bytes(data)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == data
        assert resident(path) >= len(data)
        assert forget_pages(path) >= len(data)
        assert resident(path) == 0
        assert mapped[:] == data


def test_what_could_be_written_to_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        assert forget_pages(path) == 0
        assert mapped[:4] == b"mine"


def test_all_files_of_a_split_model_are_meant(tmp_path: Path) -> None:
    paths = [tmp_path / f"big-{number:05}-of-00002.gguf" for number in (1, 2)]
    for path in (*paths, tmp_path / "bigger-00001-of-00002.gguf"):
        path.write_bytes(bytes(1 << 20))
    with paths[1].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == bytes(1 << 20)
        assert forget_pages(tmp_path / "bigger-00001-of-00002.gguf") == 0
        assert forget_pages(paths[0]) == 1 << 20
        assert resident(paths[1]) == 0


def test_a_file_that_is_not_mapped_is_none(tmp_path: Path) -> None:
    assert forget_pages(tmp_path / "absent") == 0


def test_copies_take_the_place_of_pages(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    path, data = tmp_path / "file", bytes(range(251)) * (64 * page // 251)
    path.write_bytes(data)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        # Two in one page, one over a border, and what the file does not have.
        ranges = [(10 * page + 5, 10 * page + 9), (10, 20), (10 * page + 100, 11 * page + 1), (200 * page, 201 * page)]
        assert take_out(path, ranges) == 3 * page
        assert mapped[:] == data
        os.pwrite(file.fileno(), bytes(64 * page), 0)
        kept = {0, 10, 11}
        for number in range(len(data) // page):
            part = slice(number * page, (number + 1) * page)
            assert mapped[part] == (data[part] if number in kept else bytes(page)), number
    assert take_out(path, ranges) == 0


def test_what_is_used_brings_nothing_else_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert len(mapped[:]) == resident(path)
        take_out(path, [(1 << 20, (1 << 20) + 100), (9 << 20, (9 << 20) + 100)])
        forget_pages(path)
        assert mapped[1 << 20] == mapped[(9 << 20) + 99] == 0
        assert resident(path) == 0


def test_weights_that_are_repacked_are_not_there_twice(tmp_path: Path) -> None:
    if not probe(tmp_path).chosen.use_extra_bufts:
        pytest.skip("this CPU repacks nothing safely")
    shape = Shape("repacked", "llama", 2, 1024, 8, 8, 2816, 512, 512, False)
    path = write_model(tmp_path / "model.gguf", shape, quant="Q4_0")
    model = Model(path, use_extra_bufts=True)
    context = Context(model, ContextOptions(128, 1, 1))
    try:
        context.batch.add(0, 0, [1, 2, 3], outputs=1)
        context.decode()
        # Norms and the embedding are used where they are.
        assert resident(path) < path.stat().st_size / 4
    finally:
        context.close()
        model.close()


def test_norms_of_a_loaded_model_are_copies(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", TINY, quant="Q4_0")
    norms = [each for each in read_header(path).tensors if each.name.endswith("norm.weight")]
    model = Model(path, use_extra_bufts=probe(tmp_path).chosen.use_extra_bufts)
    try:
        # No page of the file is left there that a copy could take the place of.
        copied = take_out(path, [(each.offset, each.offset + each.n_bytes) for each in norms])
        assert norms
        assert (copied == 0) == probe(tmp_path).chosen.use_extra_bufts
    finally:
        model.close()
