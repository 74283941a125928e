"""A server that a command starts for itself, with the model that comes with the package, and ends with itself."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from swarmcpp.errors import StartupError

START_S = 120.0
"""The first start probes the CPU, which takes seconds."""
STOP_S = 15.0
POLL_S = 0.05


@contextlib.contextmanager
def own_server(data_dir: Path, console: Console) -> Iterator[str]:
    """The URL of a server on this machine that answers. Raises StartupError with what it said when it does not."""
    port = _free_port()
    argv = [sys.executable, "-m", "swarmcpp", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*argv, "--data-dir", str(data_dir)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            # It ends with this conversation: another one, or any other command, must not come to depend on it.
            env=os.environ | {"SWARMCPP_SERVER_FINDABLE": "false"},
            # Ctrl-C stops an answer; the server ends with the conversation.
            start_new_session=sys.platform != "win32",
        )
        try:
            with console.status("starting swarmcpp-guide"):
                _wait(process, port)
            yield f"http://127.0.0.1:{port}"
        except _Gone:
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            raise StartupError(f"a server for this conversation could not be started: {reason}") from None
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Gone(Exception):
    """The server ended, or took too long."""


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise _Gone
        time.sleep(POLL_S)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
