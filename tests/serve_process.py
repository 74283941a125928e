"""The real `swarmcpp serve` as a process of its own, watched from outside: HTTP, signals, files and children."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from cli_process import PROGRAM

DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0
ENGINE = "swarmcpp.worker"


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Until `condition` holds; fails the test after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Home:
    """Directories of one `swarmcpp`: where it runs, and a temporary directory that nobody else writes to."""

    def __init__(self) -> None:
        # Not pytest's tmp_path: a Unix socket path holds about 100 characters, and test names are long.
        self.path = Path(tempfile.mkdtemp(prefix="e2e-"))
        self.temp = self.path / "tmp"
        self.temp.mkdir()

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's variables without SWARMCPP_*, with the directories of this home."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("SWARMCPP_")}
        for name in ("TMPDIR", "TMP", "TEMP"):
            env[name] = str(self.temp)
        env |= {"XDG_CONFIG_HOME": str(self.path / "config"), "XDG_DATA_HOME": str(self.path / "data")}
        return env | dict(extra or {})

    def processes(self) -> list[psutil.Process]:
        """Every process that was started with this home, also those whose parent is gone."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self.temp) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def leftovers(self) -> list[str]:
        """Names in the temporary directory."""
        return sorted(path.name for path in self.temp.iterdir())

    def assert_clean(self) -> None:
        """No process and no temporary file is left; a child that has just been told to end may take a moment."""
        wait_until(lambda: not self.processes(), "its processes are gone", STOP_DEADLINE_S)
        assert self.leftovers() == []

    def remove(self) -> None:
        """End what still runs and delete everything."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.path, ignore_errors=True)


def _speaks_http(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except (OSError, http.client.HTTPException):
        return False


class ServeProcess:
    """A running server. `url` has no trailing slash; `pid` is the node's."""

    def __init__(self, home: Home, process: subprocess.Popen[bytes]) -> None:
        self.home = home
        self.process = process
        self.pid = process.pid
        self.url = ""

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return (self.home.path / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it has logged."""
        return (self.home.path / "stderr").read_text()

    @property
    def running(self) -> bool:
        """Whether the node process runs."""
        return self.process.poll() is None

    def port(self) -> int:
        """The port of its API; 0 before it listens. Those of the swarm do not speak HTTP."""
        with suppress(psutil.Error):
            for connection in psutil.Process(self.pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and _speaks_http(connection.laddr.port):
                    return int(connection.laddr.port)
        return 0

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET; (0, None) when nobody answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except OSError:
            return 0, None

    def wait_listening(self) -> None:
        """Until there is a port to ask, which is before the model is loaded."""
        wait_until(lambda: self.port() != 0 or not self.running, "it listens")
        assert self.running, f"it ended with {self.process.returncode}: {self.stderr}"
        self.url = f"http://127.0.0.1:{self.port()}"

    def wait_ready(self) -> None:
        """Until /health/ready says 200."""
        wait_until(lambda: self.get("/health/ready")[0] == 200 or not self.running, "it is ready")
        assert self.running, f"it ended with {self.process.returncode}: {self.stderr}"

    def wait_says(self, text: str) -> None:
        """Until it has printed `text`. It answers before it prints, and it prints line by line."""
        wait_until(lambda: text in self.stdout or not self.running, f"it says {text!r}", STOP_DEADLINE_S)
        assert text in self.stdout, self.stderr

    def engine_pid(self) -> int | None:
        """The engine that runs now."""
        with suppress(psutil.Error):
            for child in psutil.Process(self.pid).children():
                with suppress(psutil.Error):
                    if ENGINE in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        return int(child.pid)
        return None

    def kill_engine(self) -> int:
        """SIGKILL for the engine; its pid."""
        pid = self.engine_pid()
        assert pid is not None, "no engine runs"
        psutil.Process(pid).kill()
        return pid

    def terminate(self) -> None:
        """SIGTERM; it must end within seconds, with exit code 0, and leave nothing."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(STOP_DEADLINE_S) == 0, self.stderr
        self.home.assert_clean()

    def kill(self) -> None:
        """SIGKILL for the node."""
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)


@contextmanager
def launched(model: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[ServeProcess]:
    """`swarmcpp serve MODEL` on a free port with one thread, just started. Whatever happens it is gone afterwards.

    One thread: the waiting threads of llama.cpp spin, and a small model has little to share between them.
    """
    home = Home()
    command = [*PROGRAM, "serve", str(model), "--port", "0", "--threads", "1", *arguments]
    try:
        with (home.path / "stdout").open("wb") as out, (home.path / "stderr").open("wb") as notes:
            process = subprocess.Popen(command, stdout=out, stderr=notes, cwd=home.path, env=home.environment(env))
        try:
            yield ServeProcess(home, process)
        finally:
            process.kill()
            process.wait(STOP_DEADLINE_S)
    finally:
        home.remove()


@contextmanager
def serving(model: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[ServeProcess]:
    """A server that is ready. Unless the test has ended it, SIGTERM ends it afterwards, and must do so cleanly."""
    with launched(model, *arguments, env=env) as server:
        server.wait_listening()
        server.wait_ready()
        yield server
        if server.running:
            server.terminate()
