"""What blocks there are and which one goes next: a forest of chains in memory, pure of files and clocks.

A block is useful only together with the blocks before it, so eviction takes leaves: blocks that no stored block
continues. Among leaves it takes the one of least use, oldest first; copies of what peers have go before all others, so
that the arenas of a swarm hold more than one of them does.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_USES = 3
"""Uses that are remembered of a block. Enough to tell what is asked for again and again from what was asked for once
(S3-FIFO, SOSP 2023, counts to 3 for the same reason), and few enough that old fame is forgotten."""


@dataclass(slots=True)
class Block:
    """A stored block. `tick` is its last use, `uses` counts uses up to MAX_USES, `pins` keep it from eviction."""

    key: bytes
    parent: bytes
    slot: int
    digest: bytes
    tick: int
    uses: int = 0
    children: int = 0
    pins: int = 0
    ready: bool = True
    """Its payload is in the arena; until then it holds a slot and is not found."""
    finite: bool = False
    """Values of this digest were found finite."""
    exact: bool = True
    """See `arena.StoredBlock`."""
    copy: bool = False
    """A peer has it too: it goes before all that only this node has."""


class BlockIndex:
    """Blocks by key, the free slots, and the order of eviction. Not thread-safe."""

    def __init__(self, n_slots: int, max_entries: int = 0) -> None:
        self._blocks: dict[bytes, Block] = {}
        self._free = list(range(n_slots - 1, -1, -1))
        self._n_slots = n_slots
        self._max_entries = max_entries
        self.leaves = 0
        """Chains that are stored: blocks without a stored continuation."""
        self._heap: list[tuple[bool, int, bytes]] = []
        self.tick = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> Block | None:
        """The block of a key."""
        return self._blocks.get(key)

    def all_blocks(self) -> list[Block]:
        """Every block whose payload is stored."""
        return [block for block in self._blocks.values() if block.ready]

    def match(self, keys: Sequence[bytes]) -> list[Block]:
        """The longest stored beginning of a chain of keys. Nothing is touched."""
        found: list[Block] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None or not block.ready:
                break
            found.append(block)
        return found

    def use(self, blocks: Iterable[Block]) -> None:
        """Note a use of a chain, which makes it the last to go."""
        self.tick += 1
        for block in blocks:
            block.tick = self.tick
            block.uses = min(block.uses + 1, MAX_USES)
            self._offer(block)

    def load(self, key: bytes, parent: bytes, slot: int, digest: bytes, tick: int, exact: bool = True) -> Block | None:
        """Take over a block that an earlier run stored; None when its key is there twice."""
        if key in self._blocks:
            return None
        block = Block(key, parent, slot, digest, tick, exact=exact)
        self._blocks[key] = block
        self.tick = max(self.tick, tick)
        return block

    def finish_loading(self) -> list[Block]:
        """After the last `load`: count children and free slots. Blocks without their parent's chain are dropped, and
        chains beyond the limit of entries.

        A block whose parent key is not stored is a root only if it was one: the caller passes roots' parents as
        `ROOT`. The dropped blocks are returned.
        """
        reachable: dict[bytes, bool] = {}
        for block in list(self._blocks.values()):
            trail: list[Block] = []
            at: Block | None = block
            while at is not None and at.key not in reachable:
                trail.append(at)
                reachable[at.key] = False
                if at.parent == ROOT:
                    break
                at = self._blocks.get(at.parent)
            sound = (bool(trail) and trail[-1].parent == ROOT) or (at is not None and reachable.get(at.key, False))
            for each in trail:
                reachable[each.key] = sound
        dropped = [self._blocks.pop(block.key) for block in list(self._blocks.values()) if not reachable[block.key]]
        used = {block.slot for block in self._blocks.values()}
        self._free = [slot for slot in range(self._n_slots - 1, -1, -1) if slot not in used]
        for block in self._blocks.values():
            if block.parent != ROOT:
                self._blocks[block.parent].children += 1
        for block in self._blocks.values():
            if not block.children:
                self.leaves += 1
            self._offer(block)
        while self._max_entries and self.leaves > self._max_entries and (gone := self._evict_chain()):
            dropped += gone
        return dropped

    def reserve(self, key: bytes, parent: bytes, *, copy: bool = False) -> tuple[Block | None, list[Block]]:
        """Make room for a block and enter it, not ready and pinned: (block, what was evicted for it).

        None when it is there already, when its parent is not, or when every slot is pinned.
        """
        above = self._blocks.get(parent)
        if key in self._blocks or (parent != ROOT and above is None):
            return None, []
        if above:
            # The chain that is being stored must not be evicted for its own next block.
            above.pins += 1
        evicted: list[Block] = []
        try:
            while not self._free or self._too_many_chains(above):
                gone = self._evict_chain() if self._free else self._evict()
                if not gone:
                    return None, evicted
                evicted += gone
        finally:
            if above:
                above.pins -= 1
        self.tick += 1
        block = Block(key, parent, self._free.pop(), b"", self.tick, pins=1, ready=False, copy=copy)
        self._blocks[key] = block
        if above:
            self.leaves -= above.children == 0
            above.children += 1
        self.leaves += 1
        self._offer(block)
        return block, evicted

    def _too_many_chains(self, above: Block | None) -> bool:
        """Whether one more block after `above` makes a chain too many; what is evicted may change that."""
        grows = above is None or above.children > 0
        return bool(self._max_entries) and grows and self.leaves >= self._max_entries

    def reopen(self, block: Block) -> None:
        """Let a block that nobody reads be written again in its place: it is as `reserve` leaves a new one."""
        block.ready, block.finite = False, False
        block.pins += 1

    def commit(self, block: Block, digest: bytes) -> None:
        """The payload of a reserved block is in the arena."""
        block.digest, block.ready, block.finite = digest, True, True
        block.pins -= 1

    def remove(self, block: Block) -> list[Block]:
        """Drop a block and every block that continues it."""
        dropped = [block]
        doomed = {block.key}
        # Children are not linked downwards: this happens on damage only, and a scan is cheaper than a list per block.
        while True:
            more = [other for other in self._blocks.values() if other.parent in doomed and other.key not in doomed]
            if not more:
                break
            dropped += more
            doomed.update(other.key for other in more)
        for each in reversed(dropped):
            if each.key in self._blocks:
                self._forget(each)
        return dropped

    def _offer(self, block: Block) -> None:
        if not block.children:
            heapq.heappush(self._heap, (not block.copy, block.tick, block.key))
            if len(self._heap) > 4 * len(self._blocks) + 1024:
                leaves = (each for each in self._blocks.values() if not each.children)
                self._heap = [(not each.copy, each.tick, each.key) for each in leaves]
                heapq.heapify(self._heap)

    def _evict_chain(self) -> list[Block]:
        """Drop the least useful leaf with the blocks that only it continues, but for those that were used since.

        Leaf by leaf, a chain too many would cost all chains of equal use the most of their blocks.
        """
        gone = self._evict()
        while gone:
            last = gone[-1]
            above = self._blocks.get(last.parent)
            if above is None or above.children or above.pins or above.tick > gone[0].tick:
                break
            self.evictions += 1
            self._forget(above)
            gone.append(above)
        return gone

    def _evict(self) -> list[Block]:
        """Drop the least useful leaf; empty when every leaf is pinned."""
        pinned: list[tuple[bool, int, bytes]] = []
        victim: Block | None = None
        while self._heap and victim is None:
            only_here, tick, key = heapq.heappop(self._heap)
            block = self._blocks.get(key)
            if block is None or block.tick != tick or block.copy is only_here or block.children:
                continue
            if block.pins:
                pinned.append((only_here, tick, key))
            elif block.uses:
                # Asked for again since it came up last: it goes round once more for each use.
                block.uses -= 1
                self.tick += 1
                block.tick = self.tick
                self._offer(block)
            else:
                victim = block
        for entry in pinned:
            heapq.heappush(self._heap, entry)
        if victim is None:
            return []
        self.evictions += 1
        self._forget(victim)
        return [victim]

    def _forget(self, block: Block) -> None:
        del self._blocks[block.key]
        self._free.append(block.slot)
        if not block.children:
            self.leaves -= 1
        above = self._blocks.get(block.parent)
        if above:
            above.children -= 1
            if not above.children:
                self.leaves += 1
                self._offer(above)

    def check_integrity(self) -> None:
        """Raise AssertionError unless free + used = total, and children and leaves are counted right."""
        slots = [block.slot for block in self._blocks.values()] + self._free
        if sorted(slots) != list(range(self._n_slots)):
            raise AssertionError("free and used slots are not all slots, each once")
        children: dict[bytes, int] = {}
        for block in self._blocks.values():
            if block.parent != ROOT:
                if block.parent not in self._blocks:
                    raise AssertionError("a block without its parent")
                children[block.parent] = children.get(block.parent, 0) + 1
        for block in self._blocks.values():
            if block.children != children.get(block.key, 0):
                raise AssertionError("a wrong count of children")
        if self.leaves != sum(1 for block in self._blocks.values() if not block.children):
            raise AssertionError("a wrong count of leaves")


ROOT = bytes(32)
"""The parent of first blocks in an index. Their own key already depends on the chain's root key."""
