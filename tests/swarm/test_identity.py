"""Swarm keys, node ids and join tokens."""

from __future__ import annotations

import pytest
import zmq
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import BadToken
from swarmcpp.peers import Address
from swarmcpp.swarm.identity import (
    JoinToken,
    SwarmKey,
    curve_key_bytes,
    new_node_keys,
    node_id,
    valid_address,
)

NODE = new_node_keys()
OTHER = new_node_keys()
SECRET = bytes(range(32))
KEY = SwarmKey(SECRET)
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20})(\.[a-z0-9-]{1,20}){0,4}", fullmatch=True),
    st.just("fe80::1%eth0"),
    st.just("x" * 63 + ("." + "y" * 63) * 2 + "." + "z" * 61),
)
addresses = st.builds(Address, hosts, st.integers(1, 65535), st.sampled_from([NODE.public, OTHER.public]))


def test_members_derive_the_same_and_strangers_something_else() -> None:
    again, stranger = SwarmKey(SECRET), SwarmKey.new()
    assert (again, again.swarm_id, again.member) == (KEY, KEY.swarm_id, KEY.member)
    assert again.block_id(b"k" * 32) == KEY.block_id(b"k" * 32)
    assert stranger.swarm_id != KEY.swarm_id
    assert stranger.member != KEY.member
    assert stranger.block_id(b"k" * 32) != KEY.block_id(b"k" * 32)


def test_what_is_derived_never_changes_between_versions() -> None:
    # Nodes of different versions must agree; change these numbers and no old swarm can be joined any more.
    assert KEY.swarm_id == "53f74f49222ce6e9"
    assert KEY.member.public == "S7v83n0[s6/mr^{Hie%rwFtn&n+trd)n&O*=Qlqy"
    assert KEY.block_id(bytes(32)).hex() == "c506671671dbb3ef7763ff262c1cc002"
    assert str(JoinToken(KEY)) == "swarm1-2wkH4kHMn2WPndf8CxmsoFkX93ouZMJUwTBFSZpDCeNeHBpDdR"


def test_shapes_of_what_is_derived() -> None:
    assert len(KEY.swarm_id) == 16
    assert set(KEY.swarm_id) <= set("0123456789abcdef")
    assert zmq.curve_public(KEY.member.secret.encode()).decode() == KEY.member.public
    assert len(KEY.block_id(b"")) == 16
    assert KEY.block_id(b"a") != KEY.block_id(b"b")
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        SwarmKey(SECRET[1:])


def test_a_node_id_is_the_hash_of_the_public_key() -> None:
    assert node_id(NODE.public) == blake3(NODE.public.encode("ascii")).digest()[:8].hex()
    assert node_id(NODE.public) != node_id(OTHER.public)
    assert zmq.curve_public(NODE.secret.encode()).decode() == NODE.public


def test_nothing_secret_is_in_a_repr() -> None:
    token = JoinToken(KEY, (Address("10.0.0.1", 7777, NODE.public),))
    shown = f"{KEY!r} {NODE!r} {KEY.member!r} {token!r} {[token]}"
    for secret in (SECRET.hex(), repr(SECRET)[2:20], NODE.secret, KEY.member.secret, str(token)):
        assert secret not in shown
    assert KEY.swarm_id in shown
    assert NODE.public in shown


@given(st.binary(min_size=32, max_size=32), st.lists(addresses, max_size=8))
def test_a_token_says_what_it_was_made_of(secret: bytes, where: list[Address]) -> None:
    token = JoinToken(SwarmKey(secret), tuple(where))
    text = str(token)
    assert JoinToken.parse(text) == token
    assert text.startswith("swarm1-")
    assert set(text.removeprefix("swarm1-")) <= set(BASE58)
    assert len(text) <= 4096


def test_a_token_is_short() -> None:
    one = Address("192.168.1.20", 7777, NODE.public)
    assert len(str(JoinToken(KEY, (one,)))) <= 112
    # A second address of the same node does not repeat its key.
    both = str(JoinToken(KEY, (one, Address("10.0.0.7", 7777, NODE.public))))
    assert len(both) - len(str(JoinToken(KEY, (one,)))) <= 11


@pytest.mark.parametrize("form", ["{}", "  {}\n", "swarmcpp join {}", "\t swarmcpp  join\n{} "])
def test_what_gets_copied_with_a_token_does_not_matter(form: str) -> None:
    token = JoinToken(KEY, (Address("::1", 1, NODE.public),))
    text = str(token)
    assert JoinToken.parse(form.format(text)) == token
    assert JoinToken.parse(form.format(text[:40] + "\n" + text[40:])) == token


@given(st.data())
def test_a_mistyped_token_says_so(data: st.DataObject) -> None:
    text = str(JoinToken(KEY, (Address("192.168.1.20", 7777, NODE.public), Address("box.local", 80, OTHER.public))))
    at = data.draw(st.integers(len("swarm1-"), len(text) - 1))
    wrong = data.draw(st.sampled_from([digit for digit in BASE58 if digit != text[at]]))
    mistyped = data.draw(
        st.sampled_from([text[:at] + wrong + text[at + 1 :], text[:at] + text[at + 1 :], text[:at] + wrong + text[at:]])
    )
    with pytest.raises(BadToken, match="damaged"):
        JoinToken.parse(mistyped)


@given(st.integers(0, 200))
def test_a_token_cut_anywhere_is_refused(size: int) -> None:
    text = str(JoinToken(KEY, (Address("192.168.1.20", 7777, NODE.public), Address("box.local", 80, OTHER.public))))
    with pytest.raises(BadToken):
        JoinToken.parse(text[: min(size, len(text) - 1)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" swarmcpp join ", "empty"),
        ("hello", "no join token: one begins with swarm1-"),
        ("swarm-abc", "no join token"),
        ("swarm2-abc", "format 2, this swarmcpp reads format 1"),
        ("swarm1-", "damaged"),
        ("swarm1-1", "damaged"),
        ("swarm1-abc0", "character 11 is '0'"),
        ("swarm1-é\udc80", "damaged"),
        ("swarm1-" + "z" * 5000, "at most 4096 characters, this text has 5007"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadToken, match=message) as caught:
        JoinToken.parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=300), st.booleans())
def test_any_text_is_a_token_or_refused(text: str, prefixed: bool) -> None:
    with pytest.raises(BadToken):
        JoinToken.parse("swarm1-" + text if prefixed else text)


@given(st.binary(max_size=200))
def test_a_sound_checksum_over_garbage_is_refused_or_read(garbage: bytes) -> None:
    # Whoever can make a token can make this one.
    body = b"\x01" + SECRET + garbage
    number = int.from_bytes(body + blake3(b"swarm1-" + body).digest(4), "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = BASE58[digit] + digits
    try:
        token = JoinToken.parse("swarm1-" + digits)
    except BadToken:
        return
    assert token.key == KEY
    assert all(valid_address(address) for address in token.addresses)


def test_too_many_or_impossible_addresses_make_no_token() -> None:
    good = Address("10.0.0.1", 7777, NODE.public)
    with pytest.raises(BadToken, match="at most 8 addresses, not 9"):
        JoinToken(KEY, (good,) * 9)
    with pytest.raises(BadToken, match="no address of a node"):
        JoinToken(KEY, (Address("a host", 7777, NODE.public),))


@pytest.mark.parametrize(
    "host", ["", "*", "a b", "10.0.0.1;10.0.0.2", "x" * 254, "[::1]", "a/b", "fe80::1%e;f", "böx", "a..b", "\n", "x\n"]
)
def test_hosts_that_cannot_be_connected_to(host: str) -> None:
    assert not valid_address(Address(host, 7777, NODE.public))


@pytest.mark.parametrize("host", ["10.0.0.1", "::1", "fe80::1%eth0", "box", "box.local", "my_box.lan.", "8.example"])
def test_hosts_that_can(host: str) -> None:
    assert valid_address(Address(host, 7777, NODE.public))


@pytest.mark.parametrize(
    "key",
    ["", "x" * 39, "x" * 41, "#" * 40, "~" * 40, "é" * 40, NODE.public[:-1] + " "],
    ids=lambda key: f"{key[-1:]}{len(key)}",
)
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(ValueError, match=r"Z85|ASCII"):
        curve_key_bytes(key)
    assert not valid_address(Address("10.0.0.1", 7777, key))


@pytest.mark.parametrize("port", [-1, 0, 65536, 10**30])
def test_ports_that_are_none(port: int) -> None:
    assert not valid_address(Address("10.0.0.1", port, NODE.public))
