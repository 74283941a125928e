"""How far a node trusts its peers: one number for each, learnt from what came of asking it.

A peer starts a little above the middle, so that one time-out excludes nobody. What it does well raises it slowly, a
late answer costs a little, a wrong one everything. What was lost comes back with time alone, after a time-out in hours,
after a wrong answer in a week, and only time in which this node runs counts: no step of the wall clock forgives.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarmcpp.core import Clock
from swarmcpp.files import replace_file
from swarmcpp.peers import NodeId

logger = logging.getLogger(__name__)

START = 0.6
"""DESIGN's 0.5 and a margin: with the usual minimum of 0.5, two late answers in a row are pardoned, a third is not."""

OK_SHARE = 0.02
"""Of the way to 1.0 that a good answer goes: 35 of them halve the rest."""

LATE_COST = 0.04
LATE_HEALS = 0.1 / 3600
"""Trust that comes back in a second, up to START: an excluded peer is tried again before long."""

WRONG_HEALS = START / (7 * 86400)
"""As above, after a wrong answer."""

CHECK_LEAST = 0.02
CHECK_SLOPE = (0.5 - CHECK_LEAST) / (1.0 - START)
MAX_PEERS = 1024
MAX_FILE = 1 << 20
MAX_WHY = 200
_NODE_ID = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class PeerTrust:
    """A peer's score in [0, 1], and what it did wrong; empty when nothing that still counts."""

    peer: NodeId
    score: float
    why: str = ""


@dataclass(slots=True)
class _Entry:
    score: float
    at: float
    why: str = ""


class TrustBook:
    """Scores of at most MAX_PEERS peers. Used by one thread. `clock` is monotonic; `path` None remembers nothing."""

    def __init__(self, path: Path | None, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._entries: dict[NodeId, _Entry] = {}
        self._saved = ""
        self._failing = False
        if path:
            self._load(path)

    # -- scores --------------------------------------------------------------------------------------------------

    def score(self, peer: NodeId) -> float:
        """Trust in a peer, 0 to 1; START for one that nothing is known of."""
        entry = self._entries.get(peer)
        return self._now(entry).score if entry else START

    def trusted(self, peer: NodeId, minimum: float) -> bool:
        """Whether a peer may be asked. Above 1.0 nobody may."""
        return self.score(peer) >= minimum

    def spot_check_probability(self, peer: NodeId) -> float:
        """How often a peer's block shall be computed again: 0.02 at full trust, 0.5 at the start, 1 well below it."""
        return min(1.0, CHECK_LEAST + CHECK_SLOPE * (1.0 - self.score(peer)))

    def _now(self, entry: _Entry) -> _Entry:
        """Bring an entry up to date."""
        now = self._clock()
        if entry.score < START:
            rate = WRONG_HEALS if entry.why else LATE_HEALS
            entry.score = min(START, entry.score + rate * (now - entry.at))
        if entry.score >= START:
            entry.why = ""
        entry.at = now
        return entry

    # -- events --------------------------------------------------------------------------------------------------

    def ok(self, peer: NodeId) -> None:
        """It gave what was asked for, and it was sound. Makes up for late answers, never for wrong ones."""
        entry = self._entry(peer)
        if not entry.why:
            entry.score = min(1.0, entry.score + OK_SHARE * (1.0 - entry.score))

    def late(self, peer: NodeId) -> None:
        """It did not answer in time, or broke off."""
        entry = self._entry(peer)
        entry.score = max(0.0, entry.score - LATE_COST)

    def wrong(self, peer: NodeId, why: str) -> None:
        """It gave what cannot be an honest mistake of the network: a failed check of integrity."""
        entry = self._entry(peer)
        # Once: a peer must not be able to fill the log.
        logger.log(logging.DEBUG if entry.why else logging.WARNING, "peer %s is not trusted any more: %s", peer, why)
        entry.score, entry.why = 0.0, why[:MAX_WHY] or "unknown"

    def _entry(self, peer: NodeId) -> _Entry:
        entry = self._entries.get(peer)
        if entry:
            return self._now(entry)
        if len(self._entries) >= MAX_PEERS:
            # The one that says least goes: new names must not wash away what was wrong.
            del self._entries[min(self._entries, key=lambda each: abs(self.score(each) - START))]
        entry = self._entries[peer] = _Entry(START, self._clock())
        return entry

    # -- memory --------------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[PeerTrust, ...]:
        """All peers that something is known of, the least trusted first."""
        now = [(peer, self._now(entry)) for peer, entry in self._entries.items()]
        return tuple(
            sorted((PeerTrust(peer, entry.score, entry.why) for peer, entry in now), key=lambda each: each.score)
        )

    def save(self) -> None:
        """Write what changed since the last time; call it now and then, and at the end. Says once that it cannot."""
        text = json.dumps(
            {
                "version": 1,
                "peers": {each.peer: {"score": round(each.score, 4), "why": each.why} for each in self.snapshot()},
            }
        )
        if self._path is None or text == self._saved:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, text.encode())
        except OSError as error:
            if not self._failing:
                logger.warning("%s: trust in peers cannot be saved: %s", self._path, error)
            self._failing = True
            return
        self._saved, self._failing = text, False

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                content = json.loads(file.read(MAX_FILE))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s: cannot be read, starting with equal trust in all peers: %s", path, error)
            return
        now = self._clock()
        damaged = not isinstance(content, dict)
        for peer in _sound_peers(content):
            if peer is None:
                damaged = True
            elif len(self._entries) < MAX_PEERS:
                self._entries[peer.peer] = _Entry(peer.score, now, peer.why)
        if damaged:
            logger.warning("%s: what is damaged in it is ignored", path)


def _sound_peers(content: object) -> Iterator[PeerTrust | None]:
    """The peers of a file's content, in its order, which is the least trusted first; None for each that is damaged."""
    peers = content.get("peers") if isinstance(content, dict) else None
    if not isinstance(peers, dict):
        yield None
        return
    for peer, record in peers.items():
        fields = record if isinstance(record, dict) else {}
        score, why = fields.get("score"), fields.get("why")
        known = isinstance(why, str) and _NODE_ID.fullmatch(peer)
        # Python's JSON knows NaN, which equals nothing.
        if known and isinstance(score, int | float) and score == score:
            yield PeerTrust(peer, float(min(max(score, 0.0), 1.0)), str(why)[:MAX_WHY])
        else:
            yield None
