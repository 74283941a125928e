"""Who belongs to a swarm and who a node is: the swarm key, what follows from it, node keys, and the join token.

Members share one swarm key. The *member* key pair that follows from it is the client side of every swarm socket, so
a server admits exactly those who hold the key. Each node has a key pair of its own, the server side of its sockets, so
a client knows whom it asks.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import struct
from dataclasses import dataclass, field
from typing import Final

import zmq
from blake3 import blake3
from zmq.utils import z85

from swarmcpp.errors import BadToken
from swarmcpp.peers import BLOCK_ID_BYTES, Address, NodeId

SWARM_KEY_BYTES: Final = 32
MAX_TOKEN_ADDRESSES: Final = 8

_CURVE_KEY_BYTES = 32
_Z85_CHARACTERS = 40
_TOKEN_VERSION = 1
_PREFIX = f"swarm{_TOKEN_VERSION}-"
_MAX_TEXT = 4096
"""Characters. Eight addresses with names of 253 characters take 3,300; the base conversion is quadratic."""

_CHECKSUM_BYTES = 4
_DIGITS = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
"""Base 58 of Bitcoin: nothing that looks alike, that a chat takes for markup, or that ends a double-click."""

_IPV4, _IPV6, _NAME = range(3)
_SAME_KEY = 0x80
"""Flag of an address: it is one more of the node before, whose key is not repeated."""

_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,15}")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, in Z85 (40 characters each)."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SwarmKey:
    """The secret of a swarm, 32 bytes, and what every member derives from it (BLAKE3's key derivation mode).

    Raises ValueError when `secret` has another length.
    """

    secret: bytes = field(repr=False)
    swarm_id: str = field(init=False, compare=False)
    """16 hex digits, public: tells swarms apart and nothing about the key."""
    member: KeyPair = field(init=False, compare=False, repr=False)
    _block_key: bytes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != SWARM_KEY_BYTES:
            raise ValueError(f"a swarm key has {SWARM_KEY_BYTES} bytes, not {len(self.secret)}")
        member = z85.encode(self._derive("member")).decode()
        object.__setattr__(self, "swarm_id", self._derive("id")[:8].hex())
        object.__setattr__(self, "member", KeyPair(zmq.curve_public(member.encode()).decode(), member))
        object.__setattr__(self, "_block_key", self._derive("block ids"))

    def _derive(self, purpose: str) -> bytes:
        return blake3(self.secret, derive_key_context=f"swarmcpp swarm key 1: {purpose}").digest()

    @classmethod
    def new(cls) -> SwarmKey:
        """A key that nobody else has."""
        return cls(secrets.token_bytes(SWARM_KEY_BYTES))

    def block_id(self, key: bytes) -> bytes:
        """The id on the wire of the block with this key: its BLAKE3, keyed, so that only members can test a guess."""
        return blake3(key, key=self._block_key).digest(BLOCK_ID_BYTES)


def node_id(public_key: str) -> NodeId:
    """Who a node with this public key (Z85) is."""
    return blake3(public_key.encode()).hexdigest(8)


def new_node_keys() -> KeyPair:
    """A new identity."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def curve_key_bytes(key: str) -> bytes:
    """The 32 bytes of a CURVE key in Z85. Raises ValueError when it is none."""
    if len(key) != _Z85_CHARACTERS:
        raise ValueError(f"a key in Z85 has {_Z85_CHARACTERS} characters, not {len(key)}")
    try:
        return z85.decode(key)
    except (KeyError, struct.error) as error:
        raise ValueError("not a key in Z85") from error


def valid_address(address: Address) -> bool:
    """Whether it can be connected to at all. For addresses that came from outside: zmq reads `;` and `*` in a host."""
    try:
        curve_key_bytes(address.key)
    except ValueError:
        return False
    return 1 <= address.port <= 65535 and (_ip(address.host) is not None or bool(_HOST.fullmatch(address.host)))


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    _, percent, scope = host.partition("%")
    if percent and not _SCOPE.fullmatch(scope):
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a machine needs to join: the swarm key and where members may be. `str(token)` is its text, a secret.

    Binary, in base 58: a 1, the key, the addresses (kind, host, port, public key), and 4 bytes of BLAKE3 of all that.
    Raises BadToken for more than 8 addresses, and for one that nobody could connect to.
    """

    key: SwarmKey
    addresses: tuple[Address, ...] = ()

    def __post_init__(self) -> None:
        if len(self.addresses) > MAX_TOKEN_ADDRESSES:
            raise BadToken(f"a join token holds at most {MAX_TOKEN_ADDRESSES} addresses, not {len(self.addresses)}")
        for address in self.addresses:
            if not valid_address(address):
                raise BadToken(f"{str(address)[:300]!r} cannot be in a join token: it is no address of a node")

    def __str__(self) -> str:
        parts = [b"\x01", self.key.secret]
        previous = ""
        for address in self.addresses:
            parts.append(_pack(address, same_key=address.key == previous))
            previous = address.key
        body = b"".join(parts)
        return _PREFIX + _to_base58(body + _checksum(body))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The token in `text`; spaces, line breaks and a leading "swarmcpp join" do not matter.

        Raises BadToken, whose message never quotes the text: whatever it is, it may be a secret.
        """
        if len(text) > _MAX_TEXT:
            raise BadToken(f"a join token has at most {_MAX_TEXT} characters, this text has {len(text)}")
        words = text.split()
        if words[:2] == ["swarmcpp", "join"]:
            del words[:2]
        token = "".join(words)
        if not token:
            raise BadToken("the join token is empty: 'swarmcpp token' on a machine of the swarm shows it")
        _check_prefix(token)
        raw = _from_base58(token.removeprefix(_PREFIX))
        body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
        start = 1 + SWARM_KEY_BYTES
        if len(body) < start or checksum != _checksum(body):
            raise _damaged("its checksum does not match")
        try:
            return cls(SwarmKey(body[1:start]), _unpack_all(body[start:]))
        except (IndexError, UnicodeDecodeError, struct.error) as error:
            raise _damaged("an address in it is cut off") from error


def _check_prefix(token: str) -> None:
    found = re.match(r"swarm([0-9]{1,6})-", token)
    if not found:
        raise BadToken(f"this is no join token: one begins with {_PREFIX}; 'swarmcpp token' on a member shows it")
    if found[0] != _PREFIX:
        raise BadToken(
            f"this join token has format {found[1]}, this swarmcpp reads format {_TOKEN_VERSION}: "
            "run the same version of swarmcpp on both machines"
        )


def _damaged(why: str) -> BadToken:
    return BadToken(f"the join token is damaged ({why}): copy the whole line that 'swarmcpp token' shows again")


def _checksum(body: bytes) -> bytes:
    return blake3(_PREFIX.encode() + body).digest(_CHECKSUM_BYTES)


def _to_base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def _from_base58(text: str) -> bytes:
    number = 0
    for at, character in enumerate(text, len(_PREFIX) + 1):
        digit = _DIGITS.find(character)
        if digit < 0:
            raise _damaged(f"character {at} is {character!r}, which no token has")
        number = number * 58 + digit
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _pack(address: Address, *, same_key: bool) -> bytes:
    ip = _ip(address.host)
    if ip is None or "%" in address.host:
        kind, host = _NAME, bytes((len(address.host),)) + address.host.encode()
    else:
        kind, host = (_IPV4 if ip.version == 4 else _IPV6), ip.packed
    key = b"" if same_key else curve_key_bytes(address.key)
    return bytes((kind | (_SAME_KEY if same_key else 0),)) + host + struct.pack(">H", address.port) + key


def _unpack_all(data: bytes) -> tuple[Address, ...]:
    """Addresses of a token. Raises BadToken, IndexError, struct.error or UnicodeDecodeError when `data` holds none."""
    addresses: list[Address] = []
    at = 0
    while at < len(data):
        kind = data[at] & ~_SAME_KEY
        same_key = bool(data[at] & _SAME_KEY)
        at += 1
        if kind == _NAME:
            size = data[at]
            at += 1
            host = data[at : at + size].decode("ascii")
        elif kind in (_IPV4, _IPV6):
            size = 4 if kind == _IPV4 else 16
            (raw,) = struct.unpack_from(f"{size}s", data, at)
            host = str(ipaddress.ip_address(raw))
        else:
            raise _damaged(f"an address of an unknown kind, {kind}, is in it")
        (port,) = struct.unpack_from(">H", data, at + size)
        at += size + 2
        if same_key:
            key = addresses[-1].key
        else:
            (raw,) = struct.unpack_from(f"{_CURVE_KEY_BYTES}s", data, at)
            key = z85.encode(raw).decode()
            at += _CURVE_KEY_BYTES
        addresses.append(Address(host, port, key))
    return tuple(addresses)
