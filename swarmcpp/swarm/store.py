"""What a node keeps of its swarm on disk: the swarm key, addresses of peers, and who the node is.

All files are in `swarm/` of the data directory, for this user only, and are replaced as a whole, so a crash leaves the
old or the new content. Several nodes may share a data directory: they share key and peers, and each has an identity.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import zmq

from swarmcpp.errors import BadConfig
from swarmcpp.files import replace_file, try_lock
from swarmcpp.peers import Address, NodeId
from swarmcpp.swarm.identity import KeyPair, SwarmKey, curve_key_bytes, new_node_keys, node_id, valid_address

logger = logging.getLogger(__name__)

MAX_REMEMBERED: Final = 256
MAX_IDENTITIES: Final = 64
"""Nodes that may share a data directory at the same time."""

_MAX_FILE = 1 << 20
"""Bytes; 256 peers take 90 kB."""

_MAX_BOOT = 2**53


@dataclass(frozen=True, slots=True)
class SwarmState:
    """The swarm that this machine belongs to, and where its members were, the most recent first."""

    key: SwarmKey
    peers: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node is. `boot` counts its starts: no two lives of one identity have the same."""

    keys: KeyPair
    node_id: NodeId
    boot: int


class SwarmStore:
    """The files of one data directory. Methods block for a few writes to disk and raise BadConfig when these fail."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / "swarm"
        self._key_path = self._directory / "key.json"
        self._peers_path = self._directory / "peers.json"
        self._lock: BinaryIO | None = None
        self._suffix = ""

    @property
    def trust_path(self) -> Path:
        """Where what this node thinks of its peers is kept; one for each identity."""
        return self._directory / f"trust{self._suffix}.json"

    def load(self) -> SwarmState | None:
        """The remembered swarm; None when there is none. Raises BadConfig for a damaged key file."""
        try:
            content = self._read(self._key_path)
            if content is None:
                return None
            key = SwarmKey(bytes.fromhex(content["key"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BadConfig(
                f"the swarm key in {self._key_path} is damaged: delete that file, then join again with "
                "'swarmcpp join TOKEN' or start a new swarm"
            ) from error
        return SwarmState(key, self._peers(key.swarm_id))

    def save(self, key: SwarmKey) -> None:
        """Belong to the swarm of `key` from now on. Remembered peers of another swarm are not used any more."""
        self._write(self._key_path, {"key": key.secret.hex()})

    def rotate(self) -> SwarmKey:
        """Belong to a new swarm, which nobody else can join without its token."""
        key = SwarmKey.new()
        self.save(key)
        return key

    def leave(self) -> None:
        """Forget the swarm and its peers; who the node is stays."""
        try:
            for path in (self._key_path, self._peers_path):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def remember(self, addresses: Sequence[Address]) -> None:
        """Put `addresses` in front of the remembered ones. Nothing happens without a swarm.

        A failure is a warning: peers are a help for the next start, and no reason to end this one.
        """
        try:
            self._remember(addresses)
        except BadConfig as error:
            logger.warning("peers are not remembered: %s", error)

    def _remember(self, addresses: Sequence[Address]) -> None:
        state = self.load()
        if state is None:
            return
        peers: dict[tuple[str, int], Address] = {}
        for address in (*addresses, *state.peers):
            # One place holds one node: an older key there is that of a node which is gone.
            if valid_address(address):
                peers.setdefault((address.host, address.port), address)
        kept = tuple(peers.values())[:MAX_REMEMBERED]
        if kept != state.peers:
            entries = [{"host": each.host, "port": each.port, "key": each.key} for each in kept]
            self._write(self._peers_path, {"swarm": state.key.swarm_id, "peers": entries})

    def take_identity(self) -> Identity:
        """Be a node until close(): the first identity of this directory that no other node has taken."""
        self._take()
        path = self._identity_path()
        stored: tuple[KeyPair, int] | None = None
        try:
            content = self._read(path)
            stored = _identity(content) if content is not None else None
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged: this node gets a new identity", path)
        keys, boot = stored or (new_node_keys(), 0)
        return self._begin(keys, boot + 1)

    def renew_identity(self) -> Identity:
        """Be another node from now on, for when a second one somewhere has the same keys (a copied directory)."""
        self._take()
        return self._begin(new_node_keys(), 1)

    def close(self) -> None:
        """Give the identity back. May be called again."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _identity_path(self) -> Path:
        return self._directory / f"node{self._suffix}.json"

    def _take(self) -> None:
        if self._lock:
            return
        self._prepare()
        for number in range(1, MAX_IDENTITIES + 1):
            suffix = "" if number == 1 else f"-{number}"
            # A file of its own: the identity's file is replaced at each start, and a lock would go with the old one.
            path = self._directory / f"node{suffix}.lock"
            try:
                file = path.open("ab")
            except OSError as error:
                raise self._unusable(error) from error
            if try_lock(file):
                self._lock, self._suffix = file, suffix
                return
            file.close()
        raise BadConfig(
            f"{MAX_IDENTITIES} nodes already use {self._directory}: give this one another directory with --data-dir"
        )

    def _begin(self, keys: KeyPair, boot: int) -> Identity:
        # On disk before anybody hears of it: a boot that was used once must never be used again.
        self._write(self._identity_path(), {"public": keys.public, "secret": keys.secret, "boot": boot})
        return Identity(keys, node_id(keys.public), boot)

    def _peers(self, swarm_id: str) -> tuple[Address, ...]:
        try:
            content = self._read(self._peers_path)
            if content is None or content["swarm"] != swarm_id:
                return ()
            return tuple(_address(entry) for entry in content["peers"][:MAX_REMEMBERED])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged: remembered peers are forgotten", self._peers_path)
            return ()

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The object in a file; None without a file. Raises ValueError for anything else."""
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        if len(data) > _MAX_FILE:
            raise ValueError(f"more than {_MAX_FILE} bytes")
        try:
            content = json.loads(data)
        except RecursionError as error:
            raise ValueError("nested too deep") from error
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        self._prepare()
        try:
            replace_file(path, json.dumps(content, indent=1).encode())
        except OSError as error:
            raise self._unusable(error) from error

    def _prepare(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Not mkdir's mode: the directory may be there already, and the umask cuts it.
            self._directory.chmod(0o700)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> BadConfig:
        return BadConfig(
            f"cannot use {self._directory} ({error.strerror or error}): make it readable and writable for this user, "
            "or choose another directory with --data-dir"
        )


def _identity(content: dict[str, Any]) -> tuple[KeyPair, int]:
    """Keys and boot of an identity's file. Raises ValueError, KeyError or TypeError for what cannot be."""
    public, secret, boot = content["public"], content["secret"], content["boot"]
    if not (isinstance(public, str) and isinstance(secret, str) and type(boot) is int and 0 <= boot < _MAX_BOOT):
        raise ValueError("wrong types")
    curve_key_bytes(secret)
    if zmq.curve_public(secret.encode()).decode() != public:
        raise ValueError("the keys are no pair")
    return KeyPair(public, secret), boot


def _address(entry: dict[str, Any]) -> Address:
    """An address of the peers' file. Raises ValueError, KeyError or TypeError for what cannot be."""
    host, port, key = entry["host"], entry["port"], entry["key"]
    if not (isinstance(host, str) and type(port) is int and isinstance(key, str)):
        raise ValueError("wrong types")
    address = Address(host, port, key)
    if not valid_address(address):
        raise ValueError("no address")
    return address
