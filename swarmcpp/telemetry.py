"""Log set-up, DIAG lines for machines to read, and moving averages of rates."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmcpp.core import Clock

if TYPE_CHECKING:
    from rich.console import Console

ROOT_LOGGER = "swarmcpp"
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_STYLES = {logging.DEBUG: "dim", logging.INFO: "", logging.WARNING: "yellow", logging.ERROR: "red"}

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without control characters but newline and tab, so that a model or its file cannot steer a terminal."""
    return text.translate(_CONTROLS)


class ConsoleHandler(logging.Handler):
    """Writes each record as one line above whatever progress the console shows.

    rich's own handler lays records out in columns and wraps them, which would break DIAG lines apart.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            style = _STYLES.get(record.levelno, "bold red")
            text = printable(self.format(record))
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        except (OSError, ValueError):
            # Standard error is closed: logging must not end the program.
            self.handleError(record)


def setup_logging(verbosity: int, console: Console | None = None) -> None:
    """Send the log to `console` (standard error without one): warnings, with 1 also what happens, with 2 DIAG lines.

    Other libraries stay at warnings. May be called again; the last call counts.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each, ConsoleHandler)]:
        root.removeHandler(old)
    root.addHandler(ConsoleHandler(console))
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT_LOGGER).setLevel(_LEVELS[max(0, min(verbosity, len(_LEVELS) - 1))])


def diag(logger: logging.Logger, event: str, /, **fields: object) -> None:
    """Log `DIAG: event key=value ...` at debug level: one line, fields in the order given.

    Numbers have at most six significant digits, None is `-`, and text with spaces, quotes, `=`,
    backslashes or control characters is a JSON string.
    """
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", diag_line(event, fields))


def diag_line(event: str, fields: dict[str, object]) -> str:
    """The text of a DIAG line."""
    return " ".join([f"DIAG: {event}", *(f"{key}={_diag_value(value)}" for key, value in fields.items())])


def _diag_value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    plain = text and text != "-" and text.isprintable() and not any(mark in text for mark in ' "=\\')
    return text if plain else json.dumps(text)


class RateEma:
    """A moving average of a rate: units per second of work, recent work counting more.

    Units and seconds decay together by half every `half_life_s`, so a long sample weighs as much as the many short
    ones of the same length would. `expiry_s` after the last sample the rate is unknown again.
    """

    __slots__ = ("_at", "_clock", "_expiry_s", "_half_life_s", "_seconds", "_units")

    def __init__(self, *, half_life_s: float, expiry_s: float, clock: Clock) -> None:
        if half_life_s <= 0 or expiry_s <= 0:
            raise ValueError(f"half_life_s = {half_life_s} and expiry_s = {expiry_s} must be above 0")
        self._half_life_s = half_life_s
        self._expiry_s = expiry_s
        self._clock = clock
        self._units = 0.0
        self._seconds = 0.0
        self._at: float | None = None

    def add(self, units: float, seconds: float) -> None:
        """Add work of `units` that took `seconds` and ended now. Samples without time are dropped."""
        if seconds <= 0 or units < 0:
            return
        now = self._clock()
        if self._at is None or now - self._at > self._expiry_s:
            self._units = self._seconds = 0.0
        else:
            fade = 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
            self._units *= fade
            self._seconds *= fade
        self._units += units
        self._seconds += seconds
        self._at = now

    def rate(self) -> float | None:
        """Units per second; None before the first sample and after the expiry."""
        if self._at is None or self._clock() - self._at > self._expiry_s:
            return None
        return self._units / self._seconds
