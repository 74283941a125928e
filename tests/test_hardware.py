"""Hardware facts: parsers on texts of real systems, the whole on file trees of a test's own."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp import hardware
from swarmcpp.hardware import (
    CgroupLimits,
    cgroup_dirs,
    cpu_quota_v1,
    disk_free,
    parse_cpu_max,
    parse_cpuinfo,
    parse_memory_limit,
    parse_memory_stat,
    read_cgroup,
    read_hardware,
    usable_cores,
)

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu

processor\t: 2
physical id\t: 0
core id\t\t: 1
"""

ARM = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd asimddp crc32
CPU implementer\t: 0x41
CPU part\t: 0xd0b

processor\t: 1
Features\t: fp asimd

Revision\t: c04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""


def test_cpuinfo_of_x86() -> None:
    cpu = parse_cpuinfo(X86)
    assert cpu.model == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert {"avx2", "amx_int8"} <= cpu.flags
    assert cpu.cores == {0: (0, 0), 1: (0, 0), 2: (0, 1)}


def test_cpuinfo_of_arm() -> None:
    cpu = parse_cpuinfo(ARM)
    assert (cpu.model, cpu.cores) == ("Raspberry Pi 5 Model B Rev 1.0", {})
    assert "asimddp" in cpu.flags
    assert parse_cpuinfo(ARM.split("Revision")[0]).model == "ARM implementer 0x41 part 0xd0b"


@given(st.text())
def test_no_text_breaks_the_parsers(text: str) -> None:
    parse_cpuinfo(text)
    parse_cpu_max(text)
    parse_memory_limit(text)
    assert parse_memory_stat(text) >= 0
    cgroup_dirs(text, text)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("max 100000\n", None), ("150000 100000\n", 1.5), ("50000\n", 0.5), ("", None), ("x y", None), ("1 0", None)],
)
def test_cpu_max(text: str, cpus: float | None) -> None:
    assert parse_cpu_max(text) == cpus


def test_quota_of_version_1() -> None:
    assert cpu_quota_v1("-1\n", "100000\n") is None
    assert cpu_quota_v1("400000\n", "100000\n") == 4.0


def test_memory_limit() -> None:
    assert parse_memory_limit("max\n") is None
    assert parse_memory_limit("9223372036854771712\n") is None
    assert parse_memory_limit("536870912\n") == 512 << 20
    assert parse_memory_stat("anon 5\ninactive_file 7\ntotal_inactive_file 9\n") == 9


@pytest.mark.parametrize(
    ("machine", "affinity", "quota", "usable"),
    [
        (4, None, None, 4),
        (4, frozenset({0, 1}), None, 1),  # two threads of one core
        (4, frozenset({0, 2}), None, 2),
        (4, None, 2.9, 2),
        (4, None, 0.5, 1),
        (1, frozenset({0, 2}), 8.0, 1),
    ],
)
def test_usable_cores(machine: int, affinity: frozenset[int] | None, quota: float | None, usable: int) -> None:
    assert usable_cores(machine, affinity, {0: (0, 0), 1: (0, 0), 2: (0, 1)}, quota) == usable


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = """\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""


def test_directories_of_version_2() -> None:
    found = cgroup_dirs("0::/user.slice/app.service\n", V2_MOUNT)
    expected = tuple(PurePosixPath(f"/sys/fs/cgroup{end}") for end in ("/user.slice/app.service", "/user.slice", ""))
    assert found == {"cpu": expected, "memory": expected}


def test_directories_of_version_1_in_a_container() -> None:
    found = cgroup_dirs("4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/docker/abc\n", V1_MOUNTS)
    assert found["memory"] == (PurePosixPath("/sys/fs/cgroup/memory"),)
    assert found["cpu"][0] == PurePosixPath("/sys/fs/cgroup/cpu,cpuacct/docker/abc")


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/a/b/memory.max": "3000000\n",
            "sys/fs/cgroup/a/b/memory.current": "900000\n",
            "sys/fs/cgroup/a/b/memory.stat": "anon 1\ninactive_file 400000\n",
            "sys/fs/cgroup/a/memory.max": "max\n",
        },
    )
    assert read_cgroup(root) == CgroupLimits(2.0, 3_000_000, 500_000)


def test_a_container_of_version_1(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
            "proc/self/mountinfo": V1_MOUNTS,
            "proc/cpuinfo": X86,
            "proc/sys/kernel/random/boot_id": "1-2-3\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000\n",
        },
    )
    found = read_hardware(root)
    assert (found.physical_cores, found.cpu_quota) == (1, 1.0)
    assert (found.memory_total, found.memory_available, found.memory_limited) == (4_000_000, 2_500_000, True)
    assert found.flags == ("amx_bf16", "amx_int8", "amx_tile", "avx", "avx2", "avx512_vnni", "avx512f")
    assert found.has_amx
    assert found.boot_id == "1-2-3"


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_affinity", lambda: None)
    found = read_hardware(tmp_path)
    assert found.cpu_model and found.boot_id
    assert found.physical_cores == found.machine_cores
    assert (found.flags, found.cpu_quota, found.memory_limited) == ((), None, False)
    assert found.memory_total == psutil.virtual_memory().total


def test_this_machine() -> None:
    found = read_hardware()
    assert 1 <= found.physical_cores <= found.machine_cores <= found.logical_cores
    assert 0 < found.memory_available <= found.memory_total
    assert read_hardware().boot_id == found.boot_id


def test_disk_free_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "not/yet/there") == pytest.approx(disk_free(tmp_path), rel=0.1)
