"""Server-sent events from bytes, as the HTML standard's "interpreting an event stream" has them."""

from __future__ import annotations

from swarmcpp.errors import WireError

MAX_EVENT_BYTES = 1 << 20
"""One token's event is a few hundred bytes; a server that sends more than this is not speaking SSE."""


class SseParser:
    """Cuts a stream of bytes into the data of its events; event names, ids and comments are left out."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[str] = []
        self._size = 0
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[str]:
        """Data of the events that `chunk` completes. Raises WireError above MAX_EVENT_BYTES for one event."""
        if self._after_cr and chunk:
            # The CR that ended the last chunk may be the first half of CR LF.
            chunk, self._after_cr = chunk.removeprefix(b"\n"), False
        if chunk.endswith(b"\r"):
            self._after_cr = True
        # Only CR and LF end a line here; splitlines of bytes agrees, that of str would not.
        lines = (self._buffer + chunk).splitlines(keepends=True)
        self._buffer = lines.pop() if lines and not lines[-1].endswith((b"\r", b"\n")) else b""
        events = [event for line in lines if (event := self._line(line.rstrip(b"\r\n"))) is not None]
        if len(self._buffer) + self._size > MAX_EVENT_BYTES:
            raise WireError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes) -> str | None:
        if not line:
            event = "\n".join(self._data) if self._data else None
            self._data, self._size = [], 0
            return event
        name, _, value = line.partition(b":")
        if name == b"data":
            self._size += len(value)
            self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
        return None
