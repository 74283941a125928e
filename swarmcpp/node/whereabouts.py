"""Where the nodes of a data directory are: each writes it down there while it runs, for the commands that ask it.

An entry is two files of one name in `nodes/`, never used again: what the node says, and a lock that it holds. The
system lets go of that when the process ends, however it does, so an entry that nobody locks is of a node that is gone.
The number of a process would prove nothing: another one may have it by now, or after the next boot.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from swarmcpp.files import replace_file, try_lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a node is reached. Never its API key: who may read the directory need not have it."""

    url: str
    """Of its API, as a client on this machine writes it."""
    pid: int
    started: float
    """Unix time."""
    swarm: str = ""
    """Id of its swarm; empty: it is in none."""
    addresses: tuple[str, ...] = ()
    """HOST:PORT of its swarm port."""
    key: str = ""
    """Its public key (Z85), which it proves at these addresses."""


class Entry:
    """What a node says in its data directory, from `write` to `close`. Methods block for a few writes to disk."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / "nodes"
        self._path = self._directory / f"{secrets.token_hex(8)}.json"
        self._lock: BinaryIO | None = None

    def write(self, where: Whereabouts) -> None:
        """Be found. Entries of nodes that are gone go. A failure is a warning: the node can be asked all the same."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._directory.glob("*.json"):
                if not _is_locked(path):
                    _remove(path)
            # Locked before there is anything to be read, so that nobody takes it for one of the dead.
            self._lock = _lock_path(self._path).open("xb")
            if not try_lock(self._lock):
                raise OSError("its files cannot be locked")
            replace_file(self._path, msgspec.json.encode(where))
        except OSError as error:
            self.close()
            logger.warning(
                "commands need --url %s: it cannot be written to %s (%s)",
                where.url,
                self._directory,
                error.strerror or error,
            )

    def close(self) -> None:
        """Be found no more. May be called again, and without `write`."""
        if self._lock:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
            _remove(self._path)


def find_nodes(data_dir: Path) -> tuple[list[Whereabouts], list[Whereabouts]]:
    """The nodes that run with a data directory, and those that are gone and could not say so; the oldest first."""
    running: list[Whereabouts] = []
    gone: list[Whereabouts] = []
    for path, where in sorted(_read_all(data_dir / "nodes"), key=lambda each: each[1].started):
        if _is_locked(path):
            running.append(where)
        elif path.exists():
            gone.append(where)
    return running, gone


def _read_all(directory: Path) -> Iterator[tuple[Path, Whereabouts]]:
    for path in directory.glob("*.json"):
        # Damaged, or of a node that ends just now.
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            yield path, msgspec.json.decode(path.read_bytes(), type=Whereabouts)


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _is_locked(path: Path) -> bool:
    """Whether the node runs that wrote the entry at `path`; where that cannot be seen, it may."""
    try:
        with _lock_path(path).open("rb") as file:
            # Two commands that look at the same time must not take each other for the node.
            return not try_lock(file, shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _remove(path: Path) -> None:
    for each in (path, _lock_path(path)):
        with suppress(OSError):
            each.unlink(missing_ok=True)
