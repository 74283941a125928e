"""`swarmcpp doctor`: what each finding says of machines that tests cannot own, and the whole on this one."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarmcpp.cli import app
from swarmcpp.commands.doctor import (
    GB,
    Finding,
    check_amx,
    check_cores,
    check_cpu,
    check_disk,
    check_kernels,
    check_memory,
    check_port,
    is_writable,
)
from swarmcpp.hardware import Hardware
from swarmcpp.llama.probe import CANDIDATES, CandidateResult, ProbeReport

LAPTOP = Hardware(
    cpu_model="Laptop",
    flags=("avx", "avx2", "fma"),
    physical_cores=8,
    machine_cores=8,
    logical_cores=16,
    cpu_quota=None,
    memory_total=16 * GB,
    memory_available=8 * GB,
    memory_limited=False,
    boot_id="1",
)


def report(*details: str) -> ProbeReport:
    """A probe where a candidate with a detail failed."""
    results = tuple(
        CandidateResult(candidate, not detail, detail, 0.2)
        for candidate, detail in zip(CANDIDATES[-len(details) :], details, strict=True)
    )
    chosen = next((result.candidate for result in results if result.ok), CANDIDATES[-1])
    return ProbeReport(chosen, results, "cpu", "library", False, "0.3.36", "CPU : AVX2 = 1")


def test_a_good_laptop_has_nothing_to_remedy() -> None:
    findings = [
        check_cpu(LAPTOP, "x86_64"),
        *check_kernels(report("", "")),
        check_amx(LAPTOP, report("", "")),
        check_cores(LAPTOP, 0),
        check_memory(LAPTOP),
        check_disk(Path("/data"), 100 * GB, writable=True),
    ]
    assert {finding.level for finding in findings} == {"ok"}
    assert not any(finding.remedy for finding in findings)
    details = " ".join(finding.detail for finding in findings)
    for fact in ("Laptop", "avx2", "0.3.36", "used: repacked", "8 of 8 physical", "16 logical", "8.0 GB of 16.0 GB"):
        assert fact in details


def assert_remedy(finding: Finding, level: str, *words: str) -> None:
    assert finding.level == level
    assert finding.remedy and "\n" not in finding.remedy
    for word in words:
        assert word in f"{finding.detail}; {finding.remedy}"


def test_an_amx_machine_whose_build_crashes() -> None:
    amx = replace(LAPTOP, flags=("amx_int8", "amx_tile", "avx2"))
    crashed = report("died of SIGILL", "")
    _, kernels = check_kernels(crashed)
    assert_remedy(kernels, "warn", "repacked fail: died of SIGILL", "used: plain", "-mno-amx-tile", "==0.3.36")
    assert_remedy(check_amx(amx, crashed), "warn", "plain kernels are used")
    assert check_amx(amx, report("", "")).level == "ok"


def test_a_build_that_runs_nothing() -> None:
    _, kernels = check_kernels(report("died of SIGILL", "died of SIGILL"))
    assert_remedy(kernels, "fail", "no model will run")


def test_an_old_cpu() -> None:
    old = replace(LAPTOP, flags=("avx",))
    assert_remedy(check_cpu(old, "x86_64"), "warn", "no AVX2")
    assert check_cpu(old, "aarch64").level == "ok"
    assert check_cpu(replace(LAPTOP, flags=()), "AMD64").level == "ok"


def test_cores_in_a_container() -> None:
    limited = replace(LAPTOP, physical_cores=2, cpu_quota=2.5)
    assert "allows 2.5 CPUs" in check_cores(limited, 2).detail
    assert_remedy(check_cores(limited, 3), "warn", "2 of 8 physical", "3 threads", "2 at most")
    assert_remedy(check_cores(replace(limited, physical_cores=1, cpu_quota=0.5), 0), "warn", "at least one whole CPU")
    assert "affinity" in check_cores(replace(LAPTOP, physical_cores=4), 0).detail


def test_little_memory() -> None:
    little = replace(LAPTOP, memory_available=GB)
    assert_remedy(check_memory(little), "warn", "close other programs")
    assert_remedy(check_memory(replace(little, memory_limited=True)), "warn", "control group", "container's limit")
    assert_remedy(check_memory(replace(LAPTOP, memory_available=GB // 10)), "fail", "--ctx-size")


def test_disks() -> None:
    assert_remedy(check_disk(Path("/data"), GB, writable=True), "warn", "/data", "--data-dir")
    assert_remedy(check_disk(Path("/data"), 1000, writable=True), "fail", "1.0 kB")
    assert_remedy(check_disk(Path("/data"), 100 * GB, writable=False), "fail", "cannot be written")


def test_what_is_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_writable(tmp_path / "not/yet")
    assert not is_writable(tmp_path / "file/below")


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_remedy(check_port("127.0.0.1", port), "warn", f"127.0.0.1:{port}", "in use", "process", "--port")
    assert check_port("127.0.0.1", port).level == "ok"
    assert check_port("127.0.0.1", 0).level == "ok"
    assert_remedy(check_port("192.0.2.1", 8080), "warn", "192.0.2.1:8080")
    assert_remedy(check_port("no.such.host.invalid", 80), "fail", "--host")


@pytest.mark.e2e
def test_doctor_on_this_machine(home: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--port", "0", "--data-dir", str(home / "new")])
    findings = {finding["topic"]: finding for finding in json.loads(result.stdout)}
    assert set(findings) == {"python", "cpu", "llama.cpp", "kernels", "amx", "cores", "memory", "disk", "port"}
    assert result.exit_code == (1 if any(finding["level"] == "fail" for finding in findings.values()) else 0)
    assert "used: " in findings["kernels"]["detail"]


@pytest.mark.e2e
def test_a_failure_is_exit_code_1(home: Path) -> None:
    (home / "file").touch()
    result = CliRunner().invoke(app, ["doctor", "--port", "0", "--data-dir", str(home / "file")])
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("fail")]
    assert "disk" in line and "cannot be written; remedy: " in line
