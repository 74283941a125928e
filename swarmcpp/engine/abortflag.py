"""Words in shared memory by which a node stops a running llama_decode of its engine.

Layout, native uint64: [0] step to abort (written by the node), [1] step that runs now, 0 when none, [2] number of
prompts in that step, [3..] their serials (written by the engine). The native abort callback compares [0] with [1], so a
request to abort one step can never hit the next one, and nothing has to be cleared.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

MAX_PROMPTS = 253
_WORDS = 3 + MAX_PROMPTS
_BYTES = _WORDS * 8


class AbortFlag:
    """One mapping of the words. The node creates the file, the engine opens it; each closes its own mapping."""

    def __init__(self, path: Path, *, create: bool) -> None:
        if create:
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _BYTES)
        self._words = np.frombuffer(self._map, np.uint64)

    @property
    def address(self) -> int:
        """Address of the two words that the native callback reads; valid until `close`."""
        return int(self._words.ctypes.data)

    def begin(self, step: int, prompt_serials: list[int]) -> None:
        """Engine: step `step` (> 0) starts, with prompt chunks of these requests."""
        serials = prompt_serials[:MAX_PROMPTS]
        self._words[3 : 3 + len(serials)] = serials
        self._words[2] = len(serials)
        # Last: the node looks at the serials only while a step is named.
        self._words[1] = step

    def end(self) -> None:
        """Engine: no step runs."""
        self._words[1] = 0

    def abort_prompt(self, serial: int) -> bool:
        """Node: abort the running step if it computes prompt rows of `serial`; whether it did.

        Steps that only decode are left alone: they are short, and aborting them would cost the others a token.
        """
        step, count = int(self._words[1]), int(self._words[2])
        if step and serial in self._words[3 : 3 + count]:
            self._words[0] = step
            return True
        return False

    def close(self) -> None:
        """Drop the mapping; `address` dangles afterwards."""
        del self._words
        self._map.close()
