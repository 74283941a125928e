"""Keys of blocks: they say what KV depends on, all of it and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.kv.keys import KEY_BYTES, KvIdentity, block_keys

IDENTITY = KvIdentity(fingerprint=bytes(range(32)), block_tokens=64, kv_types=(1, 1))

OTHERS = {
    "fingerprint": bytes(32),
    "block_tokens": 128,
    "kv_types": (1, 8),
    "flash_attention": False,
    "rope": "yarn 2",
    "lora": ("adapter",),
}

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=60)
roots = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
sizes = st.integers(1, 9)


@given(roots, token_lists, token_lists, sizes)
def test_more_tokens_leave_the_keys_before_them(root: bytes, tokens: list[int], more: list[int], size: int) -> None:
    keys = block_keys(root, tokens, size)
    assert len(keys) == len(tokens) // size
    assert block_keys(root, tokens + more, size)[: len(keys)] == keys


@given(roots, token_lists.filter(bool), sizes, st.data())
def test_a_changed_token_changes_its_key_and_all_later_ones(
    root: bytes, tokens: list[int], size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(0, 2**31 - 1).filter(lambda token: token != tokens[at]))
    keys = block_keys(root, tokens, size)
    changed = block_keys(root, [*tokens[:at], other, *tokens[at + 1 :]], size)
    assert changed[: at // size] == keys[: at // size]
    assert all(a != b for a, b in zip(changed[at // size :], keys[at // size :], strict=True))


def test_a_key_is_the_hash_of_the_key_before_and_the_little_endian_tokens() -> None:
    root = IDENTITY.root()
    first, second = block_keys(root, [1, 2, 3, 256, 5], 2)
    assert first == blake3(root + bytes((1, 0, 0, 0, 2, 0, 0, 0))).digest()
    assert second == blake3(first + bytes((3, 0, 0, 0, 0, 1, 0, 0))).digest()


def test_the_same_tokens_in_other_places_have_other_keys() -> None:
    keys = block_keys(IDENTITY.root(), [7, 8] * 10, 2)
    assert len(set(keys)) == 10


def test_the_others_name_every_field() -> None:
    assert set(OTHERS) == set(KvIdentity.__dataclass_fields__)


@pytest.mark.parametrize("field", OTHERS)
def test_every_field_changes_the_root(field: str) -> None:
    other = replace(IDENTITY, **{field: OTHERS[field]})
    assert other.root() != IDENTITY.root()
    assert other.root("salt") != IDENTITY.root("salt")


def test_the_root_does_not_move() -> None:
    """Stored blocks are found again by a later build only as long as this holds; a change of it is a new version."""
    assert IDENTITY.root().hex()[:16] == "683de119e11a5eea"


texts = st.text(max_size=6)
identities = st.builds(
    KvIdentity,
    fingerprint=st.binary(max_size=3),
    block_tokens=st.sampled_from((1, 11, 64)),
    kv_types=st.tuples(st.sampled_from((1, 11)), st.sampled_from((1, 11))),
    flash_attention=st.booleans(),
    rope=st.sampled_from(("", "salt", "True")),
    lora=st.lists(st.sampled_from(("", "salt", "a", "aa")), max_size=3).map(tuple),
)


@given(identities, texts, identities, texts)
def test_two_roots_are_equal_only_for_equal_things(a: KvIdentity, salt: str, b: KvIdentity, other: str) -> None:
    assert (a.root(salt) == b.root(other)) == ((a, salt) == (b, other))


def test_fields_cannot_be_shifted_into_one_another() -> None:
    plain = replace(IDENTITY, lora=("a", "salt", "x"))
    shifted = replace(IDENTITY, lora=("a",))
    assert plain.root("") != shifted.root("x")
    assert replace(IDENTITY, rope="ab").root() != replace(IDENTITY, rope="a", lora=("b",)).root()
    assert replace(IDENTITY, lora=("ab",)).root() != replace(IDENTITY, lora=("a", "b")).root()
    assert replace(IDENTITY, lora=("salt",)).root() != IDENTITY.root("salt")


def test_every_range_of_layers_has_an_arena_of_its_own() -> None:
    """The blocks in it have the keys of the whole model, so nothing but the file tells them apart."""
    arenas = [IDENTITY.arena_root(first, last) for first, last in ((0, 2), (2, 4), (0, 4), (0, 3), (1, 2))]
    arenas += [replace(IDENTITY, block_tokens=128).arena_root(0, 2), IDENTITY.root()]
    assert len(set(arenas)) == 7
    assert {len(arena) for arena in arenas} == {32}
    assert IDENTITY.arena_root(0, 2) == arenas[0]
