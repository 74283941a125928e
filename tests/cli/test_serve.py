"""`swarmcpp serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_process import DEADLINE_S, PROGRAM, swarmcpp, wait_for

from swarmcpp.models.synthetic import TINY, write_model

pytestmark = pytest.mark.e2e

DataDirMaker = Callable[[], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny model.gguf", TINY, quant="Q8_0")


@contextmanager
def serving(model: Path, home: Path, data: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A server that has said that it is ready, and the file that its standard output goes to."""
    out, notes = home / "out", home / "notes"
    flags = ("--port", "0", "--slots", "2", "--ctx-size", "256", "--data-dir", str(data))
    command = [*PROGRAM, "serve", str(model), *flags]
    with out.open("wb") as to, notes.open("wb") as error_to, subprocess.Popen(
        command, stdout=to, stderr=error_to
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: "curl" in out.read_text() or process.poll() is not None, "the ready line")
            assert process.poll() is None, notes.read_text()
            yield process, out
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(model: Path, home: Path, new_data_dir: DataDirMaker, number: signal.Signals) -> None:
    with serving(model, home, new_data_dir()) as (process, _out):
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 0
    assert (home / "notes").read_text() == "loading tiny model.gguf\n"


def test_the_ready_lines_and_their_curl(
    model: Path, home: Path, new_data_dir: DataDirMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMCPP_API_KEY", "sesame")
    with serving(model, home, new_data_dir()) as (_process, out):
        first, second, curl, join = out.read_text().splitlines()
        assert first.startswith("ready: tiny model at http://127.0.0.1:") and first.endswith("/v1")
        assert second.startswith("  2 slots of 256 tokens, ") and "MB of memory" in second
        assert "sesame" not in curl
        # Nobody said that other machines may come in.
        assert join.startswith("  another node on this machine") and "swarmcpp join swarm1-" in join
        url = first.rpartition(" ")[2]
        said = swarmcpp("chat", "--url", url, "--max-tokens", "4", stdin="hello\n")
        assert (said.returncode, "4 tokens" in said.stderr) == (0, True), said.stderr
        if shutil.which("curl"):
            answer = subprocess.run(["sh", "-c", f"{curl.strip()} -s"], capture_output=True, timeout=60, check=True)
            assert json.loads(answer.stdout)["object"] == "chat.completion", answer.stdout


def test_a_port_in_use_is_one_line_and_exit_code_2(model: Path, new_data_dir: DataDirMaker) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ("--port", str(taken.getsockname()[1]), "--data-dir", str(new_data_dir()))
        done = swarmcpp("serve", str(model), *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: 127.0.0.1:") and "--port" in done.stderr


def test_a_damaged_file_is_one_line_and_exit_code_2(model: Path, home: Path) -> None:
    (home / "cut.gguf").write_bytes(model.read_bytes()[:1000])
    done = swarmcpp("serve", "cut.gguf")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "cut.gguf" in done.stderr
