"""What this machine has: the CPU and its kernels' flags, usable cores, memory and disk, with container limits applied.

The parsers are pure functions of the text of /proc and /sys; `read_hardware` feeds them and falls back to psutil
and the platform module where those files do not exist.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

RELEVANT_FLAGS = frozenset(
    (
        *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
        *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "sve2"),
    )
)
"""CPU flags, in the kernel's spelling, that decide which matrix kernels of ggml run."""

NO_LIMIT = 1 << 60
"""cgroup v1 writes "no limit" as the largest page-aligned 63-bit number; nothing real is near it."""


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """What /proc/cpuinfo tells. `cores` maps a processor number to its (package, core), where the file has them."""

    model: str
    flags: frozenset[str]
    cores: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """Limits of the process's control group and all groups above it; None: no limit. CPUs, and bytes."""

    cpus: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int = 0
    """Of the group that limits memory, without the file cache that the kernel can drop."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Facts of this machine as this process may use it; sizes in bytes."""

    cpu_model: str
    flags: tuple[str, ...]
    """The relevant ones that the CPU has, sorted; empty where the system does not list them."""
    physical_cores: int
    """That this process can use: the machine's, within CPU affinity and the control group's quota; at least 1."""
    machine_cores: int
    """Physical cores of the machine, without regard to limits."""
    logical_cores: int
    cpu_quota: float | None
    """CPUs that the control group allows; None: no quota."""
    memory_total: int
    memory_available: int
    memory_limited: bool
    """Whether the control group, and not the machine, bounds the memory."""
    boot_id: str
    """Changes with every boot."""

    @property
    def has_amx(self) -> bool:
        """Whether the CPU has tile matrix instructions."""
        return any(flag.startswith("amx") for flag in self.flags)


def read_hardware(root: Path = Path("/")) -> Hardware:
    """Read the machine; `root` stands before proc/ and sys/. Files that do not exist mean no limit."""
    cpu = parse_cpuinfo(_read(root / "proc/cpuinfo"))
    limits = read_cgroup(root)
    logical = psutil.cpu_count() or os.cpu_count() or 1
    machine = psutil.cpu_count(logical=False) or logical
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    limited = limits.memory_bytes is not None and limits.memory_bytes < total
    if limits.memory_bytes is not None:
        total = min(total, limits.memory_bytes)
        available = max(0, min(available, limits.memory_bytes - limits.memory_used_bytes))
    return Hardware(
        cpu_model=cpu.model or platform.processor() or platform.machine() or "unknown",
        flags=tuple(sorted(cpu.flags & RELEVANT_FLAGS)),
        physical_cores=usable_cores(machine, _affinity(), cpu.cores, limits.cpus),
        machine_cores=machine,
        logical_cores=logical,
        cpu_quota=limits.cpus,
        memory_total=total,
        memory_available=available,
        memory_limited=limited,
        boot_id=_read(root / "proc/sys/kernel/random/boot_id").strip() or str(int(psutil.boot_time())),
    )


def usable_cores(
    machine: int, affinity: frozenset[int] | None, cores: Mapping[int, tuple[int, int]], quota: float | None
) -> int:
    """Physical cores that a process can keep busy.

    `affinity` holds the processors that it may run on (None: all); two of them on one core of `cores` count once. A
    quota is rounded down: compute threads wait for each other, so one that is throttled stops them all.
    """
    usable = machine
    if affinity:
        usable = min(usable, len({cores.get(cpu, (-1, cpu)) for cpu in affinity}))
    if quota is not None:
        usable = min(usable, int(quota))
    return max(1, usable)


def parse_cpuinfo(text: str) -> CpuInfo:
    """/proc/cpuinfo as x86 and ARM kernels write it; what is not in `text` stays empty."""
    fields: dict[str, str] = {}
    cores: dict[int, tuple[int, int]] = {}
    for block in text.split("\n\n"):
        entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        with suppress(KeyError, ValueError):
            cores[int(entries["processor"])] = (int(entries["physical id"]), int(entries["core id"]))
        for key, value in entries.items():
            fields.setdefault(key, value)
    model = fields.get("model name") or fields.get("Model") or fields.get("Hardware", "")
    if not model and "CPU part" in fields:
        model = f"ARM implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    flags = fields.get("flags") or fields.get("Features", "")
    return CpuInfo(model, frozenset(flags.split()), cores)


def read_cgroup(root: Path = Path("/")) -> CgroupLimits:
    """The tightest limits of this process's control groups, version 1 or 2."""
    groups = cgroup_dirs(_read(root / "proc/self/cgroup"), _read(root / "proc/self/mountinfo"))
    cpu, memory = ([root / each.relative_to("/") for each in groups.get(name, ())] for name in ("cpu", "memory"))
    quotas = [quota for each in cpu if (quota := _cpu_limit(each)) is not None]
    limits = [(limit, at) for at, each in enumerate(memory) if (limit := _memory_limit(each)) is not None]
    limit, at = min(limits, default=(None, 0))
    return CgroupLimits(min(quotas, default=None), limit, 0 if limit is None else _memory_used(memory[at]))


def cgroup_dirs(membership: str, mountinfo: str) -> dict[str, tuple[PurePosixPath, ...]]:
    """Directories that may limit "cpu" and "memory", the process's own first, then up to the mount.

    `membership` is /proc/self/cgroup ("id:controllers:path", no controllers for version 2), `mountinfo`
    /proc/self/mountinfo. A version 1 controller takes precedence, as in a kernel that mounts both.
    """
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            paths[name] = path
    found: dict[str, tuple[PurePosixPath, ...]] = {}
    for kind, mount_root, mount_point, options in _mounts(mountinfo):
        for name in ("cpu", "memory"):
            if kind == "cgroup2" and "" in paths:
                found.setdefault(name, _upwards(paths[""], mount_root, mount_point))
            elif kind == "cgroup" and name in options.split(",") and name in paths:
                found[name] = _upwards(paths[name], mount_root, mount_point)
    return found


def _mounts(mountinfo: str) -> Iterable[tuple[str, str, str, str]]:
    """(file system, root, mount point, its own options) of each line that proc(5) describes."""
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if dash and len(left) >= 5 and len(right) >= 1:
            yield right[0], left[3], left[4], right[2] if len(right) > 2 else ""


def _upwards(path: str, mount_root: str, mount_point: str) -> tuple[PurePosixPath, ...]:
    point = PurePosixPath(mount_point)
    group = PurePosixPath(path)
    # In a container without a namespace of its own the path is the host's, and the mount shows its part alone.
    inside = group.relative_to(mount_root) if group.is_relative_to(mount_root) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    return tuple(point / step for step in (inside, *inside.parents))


def _cpu_limit(directory: Path) -> float | None:
    modern = _read(directory / "cpu.max")
    if modern:
        return parse_cpu_max(modern)
    return cpu_quota_v1(_read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us"))


def parse_cpu_max(text: str) -> float | None:
    """cgroup v2's cpu.max, "QUOTA PERIOD" in microseconds or "max PERIOD", in CPUs."""
    quota, _, period = text.strip().partition(" ")
    return cpu_quota_v1(quota, period or "100000")


def cpu_quota_v1(quota: str, period: str) -> float | None:
    """cgroup v1's cpu.cfs_quota_us over cpu.cfs_period_us, in CPUs; a quota of -1 means none."""
    try:
        quota_us, period_us = int(quota), int(period)
    except ValueError:
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def parse_memory_limit(text: str) -> int | None:
    """memory.max or memory.limit_in_bytes in bytes; "max" and version 1's largest number mean none."""
    try:
        limit = int(text)
    except ValueError:
        return None
    return limit if 0 <= limit < NO_LIMIT else None


def parse_memory_stat(text: str) -> int:
    """Bytes of file cache that the kernel drops first, from memory.stat; 0 when it is not there."""
    values = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    try:
        return int(values.get("total_inactive_file", values.get("inactive_file", "0")))
    except ValueError:
        return 0


def _memory_limit(directory: Path) -> int | None:
    return parse_memory_limit(_read(directory / "memory.max") or _read(directory / "memory.limit_in_bytes"))


def _memory_used(directory: Path) -> int:
    text = _read(directory / "memory.current") or _read(directory / "memory.usage_in_bytes")
    used = int(text) if text.strip().isdigit() else 0
    return max(0, used - parse_memory_stat(_read(directory / "memory.stat")))


def disk_free(path: Path) -> int:
    """Bytes that this user may still write at `path`, or at the nearest directory above that exists."""
    return int(psutil.disk_usage(str(existing(path))).free)


def existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next((each for each in (path, *path.absolute().parents) if each.exists()), path)


def _affinity() -> frozenset[int] | None:
    # psutil has no cpu_affinity on macOS, where a process cannot be bound to processors.
    ask = getattr(psutil.Process(), "cpu_affinity", None)
    return frozenset(ask()) if ask is not None else None


def _read(path: Path) -> str:
    """The file's text; empty when it cannot be read, which every parser takes as "not known"."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
