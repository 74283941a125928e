"""Starts the servers that are compared, as subprocesses on 127.0.0.1, and stops them again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.reference import Reference

READY_S = 120.0
STOP_S = 15.0


class ServerDied(RuntimeError):
    """The process ended before it was ready. `signal` is the number of the signal that killed it, or None."""

    def __init__(self, message: str, signal: int | None) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one server. In `argv`, `{port}` becomes a free port and `{data}` an empty directory that is removed
    at the end, so that nothing an earlier server kept on disk can answer; `env` is added to the caller's."""

    name: str
    argv: tuple[str, ...]
    health: str
    """Path that answers 200 when it is ready; empty for a server without HTTP, which is ready when its port is open."""
    env: Mapping[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] = ()
    """CPUs it may use (Linux with taskset only); empty: all."""


def physical_cores(cpus: Sequence[int] = ()) -> int:
    """Physical cores to compute on: those of the machine, or `cpus` when a list is given; at least 1."""
    available = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return max(1, min(available, len(cpus)) if cpus else available)


def llama_server(
    reference: Reference,
    model: Path,
    *,
    slots: int,
    ctx_size: int,
    threads: int,
    batch: tuple[int, int] | None = None,
    repack: bool = True,
    cpus: tuple[int, ...] = (),
    extra: Sequence[str] = (),
) -> Launch:
    """llama-server with `slots` of `ctx_size` tokens each; `batch` is (-b, -ub), None its defaults.

    One KV stream per slot and flash attention are its fastest settings on a CPU. The RAM cache of old prompts is
    off: no prompt of the bench comes twice, so it could only cost it time.
    """
    sizes = ("-b", str(batch[0]), "-ub", str(batch[1])) if batch else ()
    argv = (
        *(str(reference.server), "-m", str(model), "--host", "127.0.0.1", "--port", "{port}"),
        *("-np", str(slots), "-c", str(slots * ctx_size), "-t", str(threads), "-fa", "on", "--no-kv-unified"),
        *("--cache-ram", "0", "--no-ui", *sizes, *(() if repack else ("--no-repack",)), *extra),
    )
    name = "llama-server" + (f" -b {batch[0]} -ub {batch[1]}" if batch else "")
    return Launch(name=name, argv=argv, health="/health", env=reference.environment(), cpus=cpus)


def swarmcpp_server(
    model: Path,
    *,
    slots: int,
    ctx_size: int,
    threads: int,
    prefill_budget_ms: int | None = None,
    cpus: tuple[int, ...] = (),
) -> Launch:
    """`swarmcpp serve` of this checkout; `prefill_budget_ms` None leaves the default."""
    argv = (
        *(sys.executable, "-m", "swarmcpp", "serve", str(model), "--host", "127.0.0.1", "--port", "{port}"),
        *("--slots", str(slots), "--ctx-size", str(ctx_size), "--threads", str(threads), "--data-dir", "{data}"),
    )
    env = {} if prefill_budget_ms is None else {"SWARMCPP_INFERENCE_PREFILL_BUDGET_MS": str(prefill_budget_ms)}
    name = "swarmcpp" + ("" if prefill_budget_ms is None else f" budget {prefill_budget_ms} ms")
    return Launch(name=name, argv=_installed(argv), health="/health/ready", env=env, cpus=cpus)


def _installed(argv: tuple[str, ...]) -> tuple[str, ...]:
    """`argv` with the console script in place of `python -m swarmcpp`, where it is installed beside this Python."""
    script = shutil.which("swarmcpp", path=str(Path(sys.executable).parent))
    return (script, *argv[3:]) if script else argv


class Running:
    """A server that is ready. `peak_rss` keeps its value after the server stopped."""

    def __init__(self, launch: Launch, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.launch = launch
        self.port = port
        self.base_url = f"http://127.0.0.1:{port}"
        self.log = log
        self.peak_rss = 0
        """Bytes: the sum over the process tree of each process's own peak; pages that two share count twice."""
        self._process = process

    @property
    def pid(self) -> int:
        """Of the process that was started; what it started has others."""
        return self._process.pid

    def sample_rss(self) -> int:
        """Take `peak_rss` now, in bytes."""
        total = 0
        for process in _tree(self._process.pid):
            try:
                total += _peak_of(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        self.peak_rss = max(self.peak_rss, total)
        return self.peak_rss


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _peak_of(process: psutil.Process) -> int:
    """Peak resident bytes of one process: the kernel's own mark where there is one, else what is resident now."""
    status = Path(f"/proc/{process.pid}/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(getattr(process.memory_info(), "peak_wset", process.memory_info().rss))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(port: int, health: str) -> bool:
    url = f"http://127.0.0.1:{port}{health}"
    try:
        if not health:
            socket.create_connection(("127.0.0.1", port), timeout=2.0).close()
            return True
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _wait_ready(process: subprocess.Popen[bytes], port: int, launch: Launch, log: Path) -> None:
    name, deadline = launch.name, time.monotonic() + READY_S
    while not _is_ready(port, launch.health):
        code = process.poll()
        tail = " | ".join(log.read_text(errors="replace").splitlines()[-4:])
        if code is not None:
            raise ServerDied(
                f"{name} ended with {code} before it was ready; log {log}: {tail}", -code if code < 0 else None
            )
        if time.monotonic() > deadline:
            raise ServerDied(f"{name} was not ready within {READY_S:.0f} s; log {log}: {tail}", None)
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process as its user would, then whatever it left behind."""
    children = _tree(process.pid)[1:]
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for orphan in children:
        with suppress(psutil.NoSuchProcess):
            orphan.kill()
    psutil.wait_procs(children, timeout=STOP_S)


@contextmanager
def running(launch: Launch, log_dir: Path) -> Iterator[Running]:
    """Start `launch`, wait until it is ready, and stop it with everything it started.

    Raises ServerDied when it never gets ready.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    data = Path(tempfile.mkdtemp(prefix="data-", dir=log_dir))
    argv = [part.replace("{port}", str(port)).replace("{data}", str(data)) for part in launch.argv]
    if launch.cpus and shutil.which("taskset"):
        argv = ["taskset", "-c", ",".join(map(str, launch.cpus)), *argv]
    log = log_dir / f"{launch.name.replace(' ', '_')}-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **launch.env}
        )
    server = Running(launch, process, port, log)
    try:
        _wait_ready(process, port, launch, log)
        yield server
        server.sample_rss()
    finally:
        _stop(process)
        shutil.rmtree(data, ignore_errors=True)


def needs_no_repack(reference: Reference, model: Path, threads: int, log_dir: Path) -> bool:
    """Whether this build's repacked kernels die on this CPU, found by starting it once (its warm-up computes).

    Raises ServerDied when it does not start without them either.
    """
    try:
        with running(llama_server(reference, model, slots=1, ctx_size=256, threads=threads), log_dir):
            return False
    except ServerDied as death:
        if death.signal is None:
            raise
    with running(llama_server(reference, model, slots=1, ctx_size=256, threads=threads, repack=False), log_dir):
        return True
