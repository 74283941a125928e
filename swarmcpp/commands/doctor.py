"""`swarmcpp doctor`: findings about this machine, each with a remedy where something can be done."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table
from rich.text import Text

from swarmcpp import __version__
from swarmcpp.commands import terminal
from swarmcpp.config import Config
from swarmcpp.hardware import Hardware, disk_free, existing, read_hardware
from swarmcpp.llama.probe import ProbeReport, probe

Level = Literal["ok", "warn", "fail"]

GB = 10**9
LOW_MEMORY = 2 * GB
"""Half of it holds a 1B model in 4 bits with its context, the smallest that is of use in a conversation."""
MIN_MEMORY = GB // 4
LOW_DISK = 5 * GB
"""A 7B model in 4 bits takes 4.4 GB."""
MIN_DISK = GB // 10

REBUILD = (
    "rebuild it without AMX: CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'"
    " -DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'\" pip install --force-reinstall --no-cache-dir"
    " --no-binary llama-cpp-python llama-cpp-python=="
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A warning or failure has a `remedy`."""

    level: Level
    topic: str
    detail: str
    remedy: str = ""


def run(config: Config, *, as_json: bool) -> int:
    """Print the findings; the exit code is 1 when one of them is a failure."""
    console = terminal.stderr()
    with console.status("trying kernels") if console.is_terminal else contextlib.nullcontext():
        findings = tuple(examine(config))
    if as_json:
        terminal.print_json([asdict(finding) for finding in findings])
    else:
        terminal.stdout().print(_table(findings))
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def examine(config: Config) -> Iterator[Finding]:
    """Look at everything. A probe that was answered before is asked again: doctor is for when something changed."""
    hardware = read_hardware()
    data_dir = config.storage.data_dir
    report = probe(data_dir, force=True)
    yield Finding("ok", "python", f"swarmcpp {__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield check_cpu(hardware, platform.machine())
    yield from check_kernels(report)
    yield check_amx(hardware, report)
    yield check_cores(hardware, config.engine.threads)
    yield check_memory(hardware)
    yield check_disk(data_dir, disk_free(data_dir), writable=is_writable(data_dir))
    yield check_port(config.server.host, config.server.port)


def check_cpu(hardware: Hardware, machine: str) -> Finding:
    """The CPU, and whether it has the vector instructions that the fast kernels stand on."""
    flags = " ".join(hardware.flags)
    detail = f"{hardware.cpu_model} ({machine})" + (f": {flags}" if flags else "")
    if machine.lower() in ("x86_64", "amd64") and flags and "avx2" not in hardware.flags:
        remedy = "expect a few tokens per second at most, and use a model of 1B parameters or less"
        return Finding("warn", "cpu", f"{detail}; no AVX2, so the fast kernels cannot run", remedy)
    return Finding("ok", "cpu", detail)


def check_kernels(report: ProbeReport) -> Iterator[Finding]:
    """What llama.cpp this is, and which of its kernels survived the probe."""
    version = report.llama_version
    info = f"; {report.system_info.strip(' |')}" if report.system_info else ""
    yield Finding("ok", "llama.cpp", f"llama-cpp-python {version or 'of unknown version'}{info}")
    tried = ", ".join(
        f"{result.candidate.name} {f'work ({result.seconds:.1f} s)' if result.ok else f'fail: {result.detail}'}"
        for result in report.results
    )
    broken = [result for result in report.results if not result.ok]
    if not broken:
        yield Finding("ok", "kernels", f"{tried}; used: {report.chosen.name}")
    elif len(broken) < len(report.results):
        yield Finding("warn", "kernels", f"{tried}; used: {report.chosen.name}", f"for more speed, {REBUILD}{version}")
    else:
        remedy = f"no model will run with this build of llama-cpp-python: {REBUILD}{version}"
        yield Finding("fail", "kernels", tried, remedy)


def check_amx(hardware: Hardware, report: ProbeReport) -> Finding:
    """Whether this CPU is one on which builds of gcc 12 crash, and what came of it."""
    if not hardware.has_amx:
        return Finding("ok", "amx", "this CPU has none, so the AMX kernels of llama.cpp do not matter")
    fastest = report.results[0] if report.results else None
    if fastest and fastest.ok:
        return Finding("ok", "amx", f"this CPU has it, and {fastest.candidate.name} kernels work with this build")
    remedy = f"nothing need be done, {report.chosen.name} kernels are used; for more speed see the finding on kernels"
    return Finding("warn", "amx", "this CPU has it, and the build's kernels fail on it", remedy)


def check_cores(hardware: Hardware, threads: int) -> Finding:
    """Cores that can be used, what limits them, and whether the threads asked for fit."""
    usable = hardware.physical_cores
    detail = f"{usable} of {hardware.machine_cores} physical cores usable ({hardware.logical_cores} logical)"
    if hardware.cpu_quota is not None:
        detail += f", control group allows {hardware.cpu_quota:g} CPUs"
    elif usable < hardware.machine_cores:
        detail += ", CPU affinity excludes the others"
    if threads > usable:
        remedy = f"more threads than cores wait for each other: leave --threads out, or set it to {usable} at most"
        return Finding("warn", "cores", f"{detail}; {threads} threads are configured", remedy)
    if hardware.cpu_quota is not None and hardware.cpu_quota < 1:
        return Finding("warn", "cores", detail, "give the container at least one whole CPU")
    return Finding("ok", "cores", detail)


def check_memory(hardware: Hardware) -> Finding:
    """Memory that is free for a model."""
    free, total = terminal.size_text(hardware.memory_available), terminal.size_text(hardware.memory_total)
    detail = f"{free} of {total} available" + (", limited by the control group" if hardware.memory_limited else "")
    if hardware.memory_available >= LOW_MEMORY:
        return Finding("ok", "memory", detail)
    more = "raise the container's limit" if hardware.memory_limited else "close other programs"
    level: Level = "fail" if hardware.memory_available < MIN_MEMORY else "warn"
    return Finding(level, "memory", detail, f"{more}, or use a small model and a small --ctx-size")


def check_disk(data_dir: Path, free: int, *, writable: bool) -> Finding:
    """Room for models in the data directory."""
    if not writable:
        remedy = "choose another directory with --data-dir, or change its permissions"
        return Finding("fail", "disk", f"{data_dir} cannot be written", remedy)
    detail = f"{terminal.size_text(free)} free at {data_dir}"
    if free >= LOW_DISK:
        return Finding("ok", "disk", detail)
    remedy = "free some space, or choose a directory on another disk with --data-dir"
    return Finding("fail" if free < MIN_DISK else "warn", "disk", detail, remedy)


def is_writable(path: Path) -> bool:
    """Whether `path`, or the nearest directory above it that exists, can be written."""
    at = existing(path)
    return at.is_dir() and os.access(at, os.W_OK | os.X_OK)


def check_port(host: str, port: int) -> Finding:
    """Whether `serve` could listen there now."""
    where = f"{host}:{port}"
    if port == 0:
        return Finding("ok", "port", f"{host}, any free port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probing:
            if os.name == "posix":
                # As the server does: a port whose last connections are still closing counts as free.
                probing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probing.bind(address)
            probing.listen(1)
    except socket.gaierror as error:
        return Finding("fail", "port", f"{host} is not an address ({error.strerror})", "choose another with --host")
    except PermissionError:
        remedy = "choose a port of 1024 or above with --port"
        return Finding("fail", "port", f"{where} cannot be bound by this user", remedy)
    except OSError as error:
        owner = _owner(port)
        detail = f"{where} cannot be bound: {os.strerror(error.errno).lower() if error.errno else error}"
        remedy = "choose another port with --port (0: any free one)"
        if owner:
            remedy = f"stop that program, or {remedy}; if it is a swarmcpp server, all is well"
        return Finding("warn", "port", detail + (f", used by {owner}" if owner else ""), remedy)
    return Finding("ok", "port", f"{where} is free")


def _owner(port: int) -> str:
    """The program that listens on `port`, where the system tells this user; else nothing."""
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()} (process {each.pid})"
    return ""


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def _table(findings: tuple[Finding, ...]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("level", no_wrap=True)
    table.add_column("topic", no_wrap=True)
    # Long lines are folded on a terminal only; in a pipe each finding stays on a line of its own.
    table.add_column("detail", overflow="fold")
    for finding in findings:
        text = Text(finding.detail)
        if finding.remedy:
            text.append("\n" if sys.stdout.isatty() else "; ").append(f"remedy: {finding.remedy}", "bold")
        table.add_row(Text(finding.level, _STYLES[finding.level]), finding.topic, text)
    return table
