"""Which peers hold which blocks, from their announcements and the pages of ids that they list. Pure."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from swarmcpp.errors import WireError
from swarmcpp.peers import NodeId
from swarmcpp.wire.peers import MAX_IDS, BlockPage, Gossip, PrefixCacheAnnounce

MAX_IDS_PER_PEER: Final = 262_144
"""1 TiB of KV at 64 KiB a token and 64 tokens a block; about 50 MB of memory here."""

RECENT_IDS: Final = 4 * MAX_IDS
RECENT: Final = 256
"""Ids and announcements of a peer that are kept to bring a page up to date which they overtook."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    bit: int
    """Its bit in the masks of `Holders`."""
    blocks: dict[bytes, set[bytes]] = field(default_factory=dict)
    """Ids by root; no empty sets."""
    count: int = 0
    recent: deque[tuple[int, PrefixCacheAnnounce]] = field(default_factory=deque)
    recent_ids: int = 0
    warned: bool = False


class Holders:
    """The index of the peers' blocks. Used by one thread.

    A peer has 262,144 ids at most, over all roots; more are ignored. Gossip is given in the order of its sequence, each
    piece once (`Membership.hear` sees to that), and `forget` comes between two lives of a peer.
    """

    def __init__(self) -> None:
        self._peers: dict[NodeId, _Peer] = {}
        self._masks: dict[bytes, dict[bytes, int]] = {}
        """By root and id: the bits of the peers that hold it, never 0."""
        self._nodes: dict[int, NodeId] = {}
        """By number of the bit."""

    def hear(self, gossip: Gossip) -> None:
        """Take over an announcement; other news says nothing of blocks."""
        announce = gossip.news
        if not isinstance(announce, PrefixCacheAnnounce):
            return
        state = self._state(gossip.node)
        state.recent.append((gossip.sequence, announce))
        state.recent_ids += len(announce.added) + len(announce.dropped)
        while state.recent_ids > RECENT_IDS or len(state.recent) > RECENT:
            _, old = state.recent.popleft()
            state.recent_ids -= len(old.added) + len(old.dropped)
        self._change(gossip.node, state, announce)

    def page(self, peer: NodeId, root: bytes, page: BlockPage, after: bytes = b"") -> bytes | None:
        """Take over the answer to ListBlocks(root, after); the first page (`after` empty) replaces all of the root.

        Then announcements newer than the page are applied again, since they may have overtaken it. Returns the `after`
        to ask for next; None when all is known, or as much as is kept of a peer. Raises WireError when ids are out of
        order or missing.
        """
        ids = (after, *page.ids)
        if any(left >= right for left, right in zip(ids, page.ids, strict=False)) or (page.more and not page.ids):
            raise WireError(f"node {peer} listed blocks out of order; the list is ignored")
        state = self._state(peer)
        if not after:
            self._remove(state, root, tuple(state.blocks.get(root, ())))
        self._add(peer, state, root, page.ids)
        for sequence, announce in state.recent:
            if announce.root == root and sequence > page.sequence:
                self._change(peer, state, announce)
        return page.ids[-1] if page.more and state.count < MAX_IDS_PER_PEER else None

    def drop(self, root: bytes, ids: Iterable[bytes], peer: NodeId) -> None:
        """`peer` was asked for these and had them not."""
        state = self._peers.get(peer)
        if state is not None:
            self._remove(state, root, ids)

    def forget(self, peer: NodeId) -> None:
        """Forget all blocks of a peer that is gone, or starts a new life."""
        state = self._peers.get(peer)
        if state is None:
            return
        for root in list(state.blocks):
            self._remove(state, root, tuple(state.blocks[root]))
        del self._peers[peer]
        del self._nodes[state.bit.bit_length() - 1]

    def holders(self, root: bytes, ids: Sequence[bytes]) -> list[tuple[bytes, tuple[NodeId, ...]]]:
        """The ids from the first on that somebody holds, each with all who do, in a fixed order."""
        masks = self._masks.get(root, {})
        names: dict[int, tuple[NodeId, ...]] = {}
        found = []
        for each in ids:
            mask = masks.get(each)
            if mask is None:
                break
            if mask not in names:
                # A chain's blocks have mostly the same few holders.
                names[mask] = tuple(sorted(self._nodes[bit] for bit in _bits(mask)))
            found.append((each, names[mask]))
        return found

    def count(self, peer: NodeId) -> int:
        """Blocks that `peer` holds, over all roots."""
        state = self._peers.get(peer)
        return 0 if state is None else state.count

    def _state(self, peer: NodeId) -> _Peer:
        state = self._peers.get(peer)
        if state is None:
            number = next(each for each in range(len(self._nodes) + 1) if each not in self._nodes)
            self._nodes[number] = peer
            state = self._peers[peer] = _Peer(1 << number)
        return state

    def _change(self, peer: NodeId, state: _Peer, announce: PrefixCacheAnnounce) -> None:
        self._remove(state, announce.root, announce.dropped)
        self._add(peer, state, announce.root, announce.added)

    def _add(self, peer: NodeId, state: _Peer, root: bytes, ids: Iterable[bytes]) -> None:
        own = state.blocks.setdefault(root, set())
        masks = self._masks.setdefault(root, {})
        for each in ids:
            if each in own:
                continue
            if state.count >= MAX_IDS_PER_PEER:
                if not state.warned:
                    state.warned = True
                    _logger.warning("node %s holds more than %d blocks; the rest is ignored", peer, MAX_IDS_PER_PEER)
                break
            own.add(each)
            masks[each] = masks.get(each, 0) | state.bit
            state.count += 1
        self._tidy(state, root)

    def _remove(self, state: _Peer, root: bytes, ids: Iterable[bytes]) -> None:
        own, masks = state.blocks.get(root), self._masks.get(root)
        if own is None or masks is None:
            return
        for each in ids:
            if each not in own:
                continue
            own.remove(each)
            state.count -= 1
            masks[each] &= ~state.bit
            if not masks[each]:
                del masks[each]
        self._tidy(state, root)

    def _tidy(self, state: _Peer, root: bytes) -> None:
        """No root without blocks is kept, so that the bound on ids bounds the roots too."""
        if not state.blocks[root]:
            del state.blocks[root]
        if not self._masks[root]:
            del self._masks[root]


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
