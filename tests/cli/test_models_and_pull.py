"""`swarmcpp models` and `swarmcpp pull`, with a catalogue and a server of the tests' own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from cli_process import DEADLINE_S, PROGRAM, swarmcpp, wait_for
from typer.testing import CliRunner

from swarmcpp.cli import app
from swarmcpp.commands.pull import progress_text
from swarmcpp.commands.serve import find_model
from swarmcpp.commands.terminal import size_text, stderr
from swarmcpp.config import load_config
from swarmcpp.errors import BadModel
from swarmcpp.models.download import PullProgress
from swarmcpp.models.embedded import GUIDE, embedded_file

CONTENT = b"GGUF" + bytes(range(256)) * 4096
HALF = len(CONTENT) // 2


class FileServer:
    """Serves CONTENT with ranges; `stall` keeps the second half back. `ranges` are the Range headers that came."""

    def __init__(self) -> None:
        self.stall = False
        self.ranges: list[str | None] = []
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._app(), handler_cancellation=True, shutdown_timeout=0.1)
        self._thread = threading.Thread(target=self._loop.run_forever)

    def _app(self) -> web.Application:
        made = web.Application()
        made.add_routes([web.get("/tiny.gguf", self._get)])
        return made

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        self.ranges.append(request.headers.get("Range"))
        start = request.http_range.start or 0
        headers = {"ETag": '"one"', "Content-Length": str(len(CONTENT) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        await response.prepare(request)
        if self.stall:
            await response.write(CONTENT[start:HALF])
            await asyncio.Event().wait()
        await response.write(CONTENT[start:])
        return response


@pytest.fixture
def server() -> Iterator[FileServer]:
    running = FileServer()
    running.start()
    yield running
    running.stop()


@pytest.fixture
def data_dir(home: Path, server: FileServer) -> Path:
    """A data directory whose models.toml adds a model called tiny."""
    directory = home / "store"
    directory.mkdir()
    (directory / "models.toml").write_text(
        f'[models.tiny]\ntitle = "Tiny"\nurl = "http://127.0.0.1:{server.port}/tiny.gguf"\nfile = "tiny.gguf"\n'
        f'quant = "Q8_0"\nsize_hint = {len(CONTENT)}\ncontext = 2048\nparameters = "1M"\nlicence = "MIT"\n'
    )
    return directory


def test_models_lists_the_catalogue(data_dir: Path) -> None:
    arguments = ["models", "--data-dir", str(data_dir)]
    rows = {line.split()[0]: line.split() for line in CliRunner().invoke(app, arguments).stdout.splitlines()}
    assert rows["name"] == ["name", "model", "size", "context", "licence", "downloaded"]
    assert rows["tiny"] == ["tiny", "Tiny", "Q8_0", "1.0", "MB", "2048", "MIT"]
    assert len(rows) > 10
    (data_dir / "models").mkdir()
    (data_dir / "models/tiny.gguf").touch()
    rows = {line.split()[0]: line.split() for line in CliRunner().invoke(app, arguments).stdout.splitlines()}
    assert rows["tiny"][-1] == "yes"
    listed = {each["name"]: each for each in json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)}
    assert (listed["tiny"]["downloaded"], listed["qwen2.5-0.5b"]["downloaded"]) == (True, False)


def test_pull_says_what_it_does_and_prints_the_path(data_dir: Path, server: FileServer) -> None:
    arguments = ["pull", "tiny", "--data-dir", str(data_dir)]
    result = CliRunner().invoke(app, arguments)
    path = data_dir / "models/tiny.gguf"
    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
    for fact in ("Tiny", "1.0 MB", "MIT", f"http://127.0.0.1:{server.port}/tiny.gguf", str(path)):
        assert fact in result.stderr
    assert path.read_bytes() == CONTENT
    again = CliRunner().invoke(app, arguments)
    assert (again.stdout, again.stderr, len(server.ranges)) == (f"{path}\n", "", 1)


@pytest.mark.e2e
def test_ctrl_c_keeps_the_part_and_the_next_pull_goes_on(data_dir: Path, server: FileServer) -> None:
    server.stall = True
    arguments = ("pull", "tiny", "--data-dir", str(data_dir))
    part = data_dir / "models/tiny.gguf.part"
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pulling:
        wait_for(lambda: part.exists() and part.stat().st_size > 0, "the first bytes")
        pulling.send_signal(signal.SIGINT)
        _, notes = pulling.communicate(timeout=DEADLINE_S)
    have = part.stat().st_size
    assert 0 < have <= HALF
    assert str(part) in notes and "goes on from there" in notes and "Traceback" not in notes
    assert pulling.returncode == 130

    server.stall = False
    done = swarmcpp(*arguments)
    assert done.returncode == 0
    assert "already here" in done.stderr
    assert server.ranges == [None, f"bytes={have}-"]
    assert (data_dir / "models/tiny.gguf").read_bytes() == CONTENT


def test_serve_downloads_a_name_that_is_not_here_yet(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config({"model": "TINY", "data_dir": data_dir}, {}, None).config
    path, name = find_model(config, stderr())
    assert (path, name) == (data_dir / "models/tiny.gguf", "tiny")
    assert path.read_bytes() == CONTENT
    assert "downloading Tiny" in capsys.readouterr().err
    assert find_model(config, stderr()) == (path, "tiny")
    assert capsys.readouterr().err == ""


def test_serve_takes_a_file_as_it_is(home: Path) -> None:
    (home / "qwen2.5-0.5b").touch()
    assert find_model(load_config({"model": "qwen2.5-0.5b"}, {}, None).config, stderr())[1] is None
    with pytest.raises(BadModel, match="qwen"):
        find_model(load_config({"model": "qwen2.5-0.6b"}, {}, None).config, stderr())


def test_serve_takes_the_guide_only_when_nothing_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_model(load_config({}, {}, None).config, stderr()) == (embedded_file(), None)
    said = capsys.readouterr().err
    assert "swarmcpp-guide" in said and "swarmcpp serve qwen2.5-0.5b" in said and said.count("\n") == 1
    assert find_model(load_config({"model": GUIDE}, {}, None).config, stderr()) == (embedded_file(), None)
    assert capsys.readouterr().err == ""
    (home / GUIDE).touch()
    assert find_model(load_config({"model": GUIDE}, {}, None).config, stderr())[0].name == GUIDE, "a file goes before"


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (PullProgress("m", 500, 2000, 0.0), "500 B of 2.0 kB, 0 B/s"),
        (PullProgress("m", 10**6, 10**9, 10.0**6), "1.0 MB of 1.0 GB, 1.0 MB/s, 16:39 left"),
        (PullProgress("m", 0, 10**10, 10.0**6), "0 B of 10.0 GB, 1.0 MB/s, 2:46:40 left"),
        (PullProgress("m", 10**6, None, 2e6), "1.0 MB, 2.0 MB/s"),
        (PullProgress("m", 1, 1, 1.0, verifying=True), "checking SHA-256"),
    ],
)
def test_progress(now: PullProgress, text: str) -> None:
    assert progress_text(now) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (4_683_073_184, "4.7 GB"),
        (1_500_000_000_000, "1.5 TB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
