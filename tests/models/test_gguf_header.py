"""The header reader: what it returns for good files, and one clear line for every bad one."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcpp.errors import BadModel
from swarmcpp.models.gguf_header import ArrayInfo, read_header
from swarmcpp.models.synthetic import TINY, write_model

U8, U32, F32, BOOL, STR, ARR, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def document(
    pairs: list[bytes], tensors: list[bytes], data: int = 0, *, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(BadModel) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_reads_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve 日本")
    writer.add_array("a.small", [1, 2, 3])
    writer.add_array("a.words", ["x", "y"])
    writer.add_array("a.tokens", [f"t{i}" for i in range(1000)])
    writer.add_array("a.scores", [0.5] * 1000)
    writer.add_tensor("w", np.zeros((3, 64), np.float32))
    writer.add_tensor("q", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)

    assert header.version == 3
    assert header.file_size == path.stat().st_size
    assert header.metadata == {
        "general.architecture": "llama",
        "a.u8": 200,
        "a.i64": -(2**40),
        "a.f64": 0.25,
        "a.bool": True,
        "a.text": "naïve 日本",
        "a.small": (1, 2, 3),
        "a.words": ("x", "y"),
        "a.tokens": ArrayInfo("string", 1000),
        "a.scores": ArrayInfo("float32", 1000),
    }
    assert header.array_length("a.tokens") == 1000
    assert header.array_length("a.small") == 3
    assert header.array_length("a.text") is None
    first, second = header.tensors
    assert (first.name, first.shape, first.n_bytes, first.offset) == ("w", (64, 3), 768, header.data_offset)
    assert (second.name, second.shape, second.n_bytes) == ("q", (32, 2), 68)
    assert second.offset == header.data_offset + 768


def test_version_2_and_alignment(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    body = document([pair("general.alignment", U32, struct.pack("<I", 64))], [tensor("w", (4,), 0, 0)], version=2)
    path.write_bytes(body.ljust(192, b"\0"))
    header = read_header(path)
    assert (header.version, header.alignment, header.data_offset % 64) == (2, 64, 0)


def test_large_vocabulary_is_fast(tmp_path: Path) -> None:
    words = b"".join(text(f"token{index}") for index in range(151_936))
    merges = b"".join(text(f"a{index} b") for index in range(151_387))
    array = struct.pack("<IQ", STR, 151_936) + words
    path = tmp_path / "vocab.gguf"
    path.write_bytes(document([pair("t", ARR, array), pair("m", ARR, struct.pack("<IQ", STR, 151_387) + merges)], []))
    started = time.thread_time()
    header = read_header(path)
    assert time.thread_time() - started < 0.3
    assert header.metadata == {"t": ArrayInfo("string", 151_936), "m": ArrayInfo("string", 151_387)}


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    assert "no such file" in refusal_of(tmp_path / "missing.gguf")
    assert "is a directory" in refusal_of(tmp_path)
    assert "no such file" in refusal_of(tmp_path / "missing" / "m.gguf")
    assert "cannot be read" in refusal_of(tmp_path / ("x" * 5000))
    assert "cannot be read" in refusal_of(Path("nul\0byte.gguf"))


def refusal_of(path: Path) -> str:
    with pytest.raises(BadModel) as caught:
        read_header(path)
    return str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal_of(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(document([], []))
    path.chmod(0)
    assert "no permission" in refusal_of(path)


def test_no_permission_as_the_system_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(document([], []))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "no permission" in refusal_of(path)


BAD = {
    "is empty": b"",
    "is not a GGUF file": b"PK\x03\x04" + bytes(100),
    "starts with b'GG'": b"GG",
    "is truncated": b"GGUF\x03\0\0\0",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "GGUF version 1": document([], [], version=1),
    "GGUF version 4": document([], [], version=4),
    "claims 1000000 metadata pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 1_000_000),
    f"claims {2**64 - 1} tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0),
    "65536 bytes in key 0": document([pair("k" * 65536, U8, b"\0")], []),
    "unknown type 99": document([pair("k", 99, b"\0")], []),
    "element": document([pair("k", ARR, struct.pack("<IQ", U64, 2**61))], []),
    "nested arrays": document([pair("k", ARR, struct.pack("<IQ", ARR, 1))], [], 64),
    "strings of 'k'": document([pair("k", ARR, struct.pack("<IQ", STR, 2**60))], []),
    "ends inside the strings": document([pair("k", ARR, struct.pack("<IQQ", STR, 100, 2**63))], [], 2000),
    "'k' twice": document([pair("k", U8, b"\0")] * 2, []),
    "invalid UTF-8 in the value of 'k'": document([pair("k", STR, text(b"\xff\xfe"))], []),
    "invalid UTF-8 in key 0": document([text(b"\xff") + struct.pack("<IB", U8, 0)], []),
    "general.alignment = 24": document([pair("general.alignment", U32, struct.pack("<I", 24))], []),
    "general.alignment = 0": document([pair("general.alignment", U32, struct.pack("<I", 0))], []),
    "general.alignment = 'x'": document([pair("general.alignment", STR, text("x"))], []),
    "tensor 'w' twice": document([], [tensor("w", (4,), 0, 0)] * 2, 64),
    "5 dimensions": document([], [tensor("w", (1,) * 5, 0, 0)], 64),
    "empty dimension": document([], [tensor("w", (4, 0), 0, 0)], 64),
    "unknown ggml type 4242": document([], [tensor("w", (4,), 4242, 0)], 64),
    "no multiple of 32": document([], [tensor("w", (33,), 8, 0)], 64),
    "data offset 64, expected 0": document([], [tensor("w", (4,), 0, 64)], 256),
    "ends at byte": document([], [tensor("w", (64, 64), 0, 0)], 100),
    "has 64 bytes in the name": document([], [tensor("n" * 64, (4,), 0, 0)], 64),
    "file has": document([], [tensor("w", (2**63, 2**63, 2**63, 2**63), 0, 0)], 64),
}


@pytest.mark.parametrize("fault", BAD, ids=str)
def test_faults(tmp_path: Path, fault: str) -> None:
    assert fault in refusal(tmp_path / "bad.gguf", BAD[fault])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TINY, quant="Q4_0")


def test_every_truncation_is_named(tiny: Path, tmp_path: Path) -> None:
    content, path = tiny.read_bytes(), tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, len(content), 997), len(content) - 1]:
        message = refusal(path, content[:size])
        assert "empty" in message or "truncated" in message or "damaged" in message or "not a GGUF" in message


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_raises_nothing_else(tiny: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(tiny.read_bytes())
    limit = read_header(tiny).data_offset
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, limit - 8))
        value = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except BadModel as error:
        assert "\n" not in str(error)
    else:
        assert all(t.offset + t.n_bytes <= header.file_size for t in header.tensors)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_noise_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + content)
    with contextlib.suppress(BadModel):
        read_header(path)
