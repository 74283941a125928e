"""What `serve` refuses at the start: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import pytest
from cli_process import PROGRAM
from serve_process import DEADLINE_S, Home, alive, serving

from swarmcpp.models.synthetic import TINY, write_model
from swarmcpp.models.synthetic_vocab import write_tokenizer

pytestmark = pytest.mark.e2e


@pytest.fixture
def home() -> Iterator[Home]:
    """Where the program runs; bad models are made here too."""
    home = Home()
    yield home
    home.remove()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def refused(home: Home, *arguments: str, env: Mapping[str, str] | None = None, under: Sequence[str] = ()) -> str:
    """The one line with which `serve` ends; `under` is a command that runs it."""
    done = subprocess.run(
        [*under, *PROGRAM, "serve", *arguments],
        cwd=home.path,
        env=home.environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    # Not an error: what it says before llama.cpp itself refuses a file.
    errors = done.stderr.removeprefix("loading model.gguf\n")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert errors.startswith("error: ")
    assert errors.endswith("\n")
    assert len(errors.splitlines()) == 1, errors
    home.assert_clean()
    return errors.strip()


# -- files -------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    whole = write_model(path, TINY, quant="Q8_0").read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(write_model(path, TINY, quant="Q8_0").read_bytes()[:700])


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("This is not a model.\n" * 100)


def rubbish_after_the_magic(path: Path) -> None:
    path.write_bytes(b"GGUF\3\0\0\0" + bytes((at * 167 + 13) % 256 for at in range(5000)))


def a_directory(path: Path) -> None:
    path.mkdir()


def missing(path: Path) -> None:
    pass


def vocabulary_only(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    write_tokenizer(writer, 512, "bytes")
    finish(writer)


def bert(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(1)
    finish(writer)


def lora(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    finish(writer)


def unknown_architecture(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "nonsense")
    writer.add_block_count(1)
    finish(writer)


def without_a_tokenizer(path: Path) -> None:
    write_model(path, TINY, quant="Q8_0", tokenizer="none")


def wrong_metadata(path: Path) -> None:
    data = write_model(path, TINY, quant="Q8_0").read_bytes()
    at = data.index(b"llama.embedding_length") + len("llama.embedding_length") + 4
    path.write_bytes(data[:at] + b"\x80\0\0\0" + data[at + 4 :])


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILES: tuple[tuple[Callable[[Path], None], str], ...] = (
    (truncated, "truncated"),
    (cut_in_the_header, "truncated"),
    (empty, "empty"),
    (text, "GGUF"),
    (rubbish_after_the_magic, "damaged"),
    (a_directory, "directory"),
    (missing, "no such file"),
    (vocabulary_only, "no weights"),
    (bert, "'bert'"),
    (lora, "LoRA"),
    (unknown_architecture, "'nonsense'"),
    (without_a_tokenizer, "no tokenizer"),
    (wrong_metadata, "llama.cpp cannot load this model"),
)


@pytest.mark.parametrize(("make", "says"), FILES, ids=[make.__name__ for make, _ in FILES])
def test_a_file_that_cannot_be_served(home: Home, data_dir: Path, make: Callable[[Path], None], says: str) -> None:
    path = home.path / "model.gguf"
    make(path)
    port = free_port()
    line = refused(home, "model.gguf", "--port", str(port), "--data-dir", str(data_dir))
    assert "model.gguf" in line
    assert says in line
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files")
def test_a_file_that_may_not_be_read(home: Home) -> None:
    path = write_model(home.path / "model.gguf", TINY, quant="Q8_0")
    path.chmod(0)
    under: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read every file, and there is no setpriv to take that away")
        rights = "-dac_override,-dac_read_search"
        under = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    line = refused(home, "model.gguf", under=under)
    assert "model.gguf" in line
    assert "ermission" in line


# -- the rest ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", TINY, quant="Q8_0"))


def test_more_memory_than_there_is(home: Home, model: str) -> None:
    line = refused(home, model, "--port", "0", "--slots", "256", "--ctx-size", str(2**24))
    assert "256 slots of 16777216 tokens need" in line
    assert "free is" in line
    assert "--ctx-size" in line


def test_a_port_in_use(home: Home, model: str, data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(home, model, "--port", str(port), "--data-dir", str(data_dir))
    assert f"127.0.0.1:{port} is in use" in line


def test_an_address_of_another_machine(home: Home, model: str, data_dir: Path) -> None:
    line = refused(home, model, "--host", "192.0.2.1", "--api-key", "x", "--port", "0", "--data-dir", str(data_dir))
    assert "192.0.2.1" in line


def test_an_open_host_without_a_key(home: Home, model: str) -> None:
    line = refused(home, model, "--host", "0.0.0.0", "--port", "0")
    assert "0.0.0.0" in line
    assert "--api-key" in line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SWARMCPP_PORT", "abc", "server.port = 'abc' (env SWARMCPP_PORT): must be a whole number from 0 to 65535"),
        ("SWARMCPP_CTX_SIZE", "-1", "engine.ctx_size = '-1' (env SWARMCPP_CTX_SIZE)"),
        ("SWARMCPP_SERVER_REQUEST_TIMEOUT_S", "nan", "server.request_timeout_s = 'nan'"),
        ("SWARMCPP_PROT", "1", "unknown variable SWARMCPP_PROT"),
    ],
)
def test_a_bad_variable(home: Home, model: str, name: str, value: str, says: str) -> None:
    assert says in refused(home, model, env={name: value})


def test_a_bad_file_of_settings(home: Home, model: str) -> None:
    (home.path / "swarmcpp.toml").write_text("[server]\nprot = 1\n")
    assert "server.prot" in refused(home, model)
    (home.path / "swarmcpp.toml").write_text("[server\n")
    assert "TOML" in refused(home, model)


def test_an_unknown_name_suggests_others(home: Home) -> None:
    line = refused(home, "qwen2.5-0.5b-instuct")
    assert "neither a file nor a known model" in line
    assert "qwen2.5-0.5b" in line.partition("known model")[2]


def test_a_temporary_directory_with_a_long_path(model: str, data_dir: Path) -> None:
    with tempfile.TemporaryDirectory() as base:
        # Longer than the path of a Unix socket may be.
        temp = Path(base) / ("x" * 100)
        temp.mkdir()
        arguments = ("--slots", "1", "--ctx-size", "256", "--data-dir", str(data_dir))
        with serving(Path(model), *arguments, env={"TMPDIR": str(temp)}) as server:
            engine = server.engine_pid()
        assert engine is not None
        assert not alive(engine)
        assert list(temp.iterdir()) == []
