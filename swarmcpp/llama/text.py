"""From tokens to text as it streams: whole characters, and nothing of a stop string. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Assembles the visible text of one generation.

    Text is a function of the tokens fed so far, so replaying the same tokens gives the same text: this is what lets a
    request move to another engine without losing or repeating a character.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._piece = piece
        self._stop = tuple(stop)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """A stop string was completed; what follows it is dropped."""

    def feed(self, token: int) -> str:
        """Text that became certain with `token`: no half characters, no text that may become a stop string."""
        if self.stopped:
            return ""
        return self._release(self._decode.decode(self._piece(token)))

    def finish(self) -> str:
        """The rest, at the end of the generation: held text, and U+FFFD for an incomplete character."""
        if self.stopped:
            return ""
        text = self._release(self._decode.decode(b"", final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        cut = min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            self._held = ""
            return text[:cut]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
