"""What one node tells people of its swarm: frozen rows, and the JSON-able form in which they travel.

Whoever reads that form may be older or newer than who wrote it, and some of the text comes from other machines: unknown
fields are ignored, those that are missing or of another type have their defaults, numbers and text are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Final, get_args, get_type_hints

MAX_ROWS: Final = 1024
"""Rows of one kind that are read. A swarm has at most so many nodes."""
MAX_TEXT: Final = 200
"""Characters of one text that are read."""
MAX_ADDRESSES: Final = 16
"""Texts of one list that are read."""
MAX_SENTENCE: Final = 1000
MAX_NUMBER: Final = 1e15
"""Numbers above are cut: no memory, rate or count of tokens is larger."""


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node. Rates are in tokens/s and bytes/s, times in seconds, memory in bytes; 0: not known, or none."""

    id: str = ""
    name: str = ""
    addresses: tuple[str, ...] = ()
    """HOST:PORT of its swarm port, the one in use first."""
    key: str = ""
    """Its public key (Z85), which it proves at these addresses."""
    is_self: bool = False
    status: str = "alive"
    """alive, suspect or gone."""
    version: str = ""
    cpu: str = ""
    cores: int = 0
    memory_used: int = 0
    memory_total: int = 0
    model: str = ""
    first_layer: int = 0
    last_layer: int = 0
    """What it holds lies in the layers [first_layer, last_layer) of `n_layers`."""
    n_layers: int = 0
    ranges: tuple[str, ...] = ()
    """What it holds, each range as FIRST-LAST (LAST not included); they may overlap. Older nodes do not tell."""
    role: str = ""
    """replica: it answers alone. head: it answers through stages, its own or others'. stage: it computes for heads.
    Empty: nothing is loaded, or the node is older."""
    slots_busy: int = 0
    slots: int = 0
    waiting: int = 0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    """All streams together."""
    ttft_s: float = 0.0
    slot_tokens: int = 0
    """Prompt tokens whose KV was in a slot; likewise those from the arena, from peers, and those computed."""
    arena_tokens: int = 0
    peer_tokens: int = 0
    computed_tokens: int = 0
    blocks: int = 0
    rtt_s: float = 0.0
    """Of the link from the node that tells this."""
    bytes_per_s: float = 0.0
    trust: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A request that the telling node answers. `state`: queued, prefill or decode; `seconds` since it came."""

    id: str = ""
    model: str = ""
    route: str = ""
    prompt_tokens: int = 0
    generated: int = 0
    seconds: float = 0.0
    state: str = "queued"
    drafted: int = 0
    """Tokens that were guessed ahead, `accepted` of which were right."""
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened `age_s` seconds before."""

    age_s: float = 0.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class SwarmStatus:
    """The swarm as the node `node` sees it at the Unix time `at`. Events are oldest first."""

    node: str = ""
    swarm: str = ""
    """Id of the swarm; empty: the node is in none."""
    nodes: tuple[NodeRow, ...] = ()
    requests: tuple[RequestRow, ...] = ()
    events: tuple[EventRow, ...] = ()
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A range [first, last) of layers that a node shall hold: its memory in bytes, the seconds of a decode pass of one
    row. Rows of one `pipeline` (from 1) answer together; 0: the layers wait for a machine that brings the rest."""

    node: str = ""
    name: str = ""
    pipeline: int = 0
    first: int = 0
    last: int = 0
    memory: int = 0
    pass_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PlanRates:
    """What to expect: tokens/s of one user and of all together, and seconds to the first token of a prompt of 512; all
    0 where the model cannot run."""

    one_tps: float = 0.0
    all_tps: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """Who would hold what of `model`, in numbers and in `sentences`, with the machines `added`; `before`: without
    these. `missing` are the ranges of layers that no machine can hold, and `missing_bytes` what they need."""

    model: str = ""
    n_layers: int = 0
    ctx_size: int = 0
    slots: int = 0
    rates: PlanRates = PlanRates()
    before: PlanRates = PlanRates()
    rows: tuple[PlanRow, ...] = ()
    added: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Each as FIRST-LAST (LAST not included)."""
    missing_bytes: int = 0
    sentences: tuple[str, ...] = field(default=(), metadata={"most": MAX_ROWS, "size": MAX_SENTENCE})


def to_json(status: SwarmStatus | SwarmPlan) -> dict[str, Any]:
    """`status` as a document of JSON."""
    return asdict(status)


def from_json(document: Mapping[str, Any]) -> SwarmStatus:
    """The status in a document of JSON, whatever is in it."""
    status: SwarmStatus = _read(SwarmStatus, document)
    return status


def plan_from_json(document: Mapping[str, Any]) -> SwarmPlan:
    """The plan in a document of JSON, whatever is in it."""
    plan: SwarmPlan = _read(SwarmPlan, document)
    return plan


_kinds: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _read(cls: Any, document: Mapping[str, Any]) -> Any:
    kinds = _kinds(cls)
    return cls(**{each.name: _value(kinds[each.name], each, document.get(each.name)) for each in fields(cls)})


def _value(kind: Any, field: Field[Any], found: object) -> Any:
    """`found`, cut to the bounds, if it is of this kind, that of `field`; else the default."""
    default: Any = field.default
    if is_dataclass(kind):
        return _read(kind, found) if isinstance(found, Mapping) else default
    if isinstance(default, tuple):
        row, _ = get_args(kind)
        entries = found if isinstance(found, list | tuple) else ()
        if row is not str:
            return tuple(_read(row, each) for each in entries[:MAX_ROWS] if isinstance(each, Mapping))
        most, size = field.metadata.get("most", MAX_ADDRESSES), field.metadata.get("size", MAX_TEXT)
        return tuple(_text(each, size) for each in entries[:most] if isinstance(each, str))
    if isinstance(default, bool):
        return found if isinstance(found, bool) else default
    if isinstance(default, str):
        return _text(found) if isinstance(found, str) else default
    if isinstance(found, bool) or not isinstance(found, int | float):
        return default
    # Cut first: an int of JSON may be too large for a float.
    number = min(max(found, 0), MAX_NUMBER)
    return default if math.isnan(number) else type(default)(number)


def _text(found: str, size: int = MAX_TEXT) -> str:
    # JSON can carry half a surrogate pair, which no terminal takes.
    return found[:size].encode("utf-8", "replace").decode()
