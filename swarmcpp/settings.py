"""Settings that describe themselves: a dataclass field carries its help, range and flag, and one mechanism
turns it into keys, variables and validation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from swarmcpp.errors import BadConfig

ENV_PREFIX = "SWARMCPP_"


def setting(
    default: object = MISSING,
    *,
    help: str,
    factory: Callable[[], object] | None = None,
    low: float | None = None,
    high: float | None = None,
    zero: str = "",
    flag: str = "",
    secret: bool = False,
    pattern: str = "",
    form: str = "",
) -> Any:
    """A dataclass field that is a setting.

    `low` and `high` are inclusive; for text they bound the number of characters. `zero` says what 0 means
    where 0 is allowed beside the range. `flag` is the command line's name for it, which also gives it the short
    variable (`--ctx-size`: SWARMCPP_CTX_SIZE). A `secret` is masked wherever it is shown. Text must match the regular
    expression `pattern` as a whole, which `form` puts in words.
    """
    metadata = {"help": help, "low": low, "high": high, "zero": zero, "flag": flag, "secret": secret}
    metadata |= {"pattern": pattern, "form": form}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, as its field describes it."""

    key: str
    kind: str
    default: Callable[[], object]
    help: str
    low: float | None
    high: float | None
    zero: str
    flag: str
    secret: bool
    pattern: str
    form: str

    @property
    def env_names(self) -> tuple[str, ...]:
        """Variables that set it, the first one wins: SECTION_KEY, then the short form of a flag."""
        names = [ENV_PREFIX + self.key.replace(".", "_").upper()]
        if self.flag:
            names.append(ENV_PREFIX + self.flag.lstrip("-").replace("-", "_").upper())
        return tuple(dict.fromkeys(names))

    @property
    def flag_key(self) -> str:
        """Its key in the flags of `load_config`: the flag as a Python name."""
        return self.flag.lstrip("-").replace("-", "_").lower()

    @property
    def limit(self) -> str:
        """The range in words; empty when every value of the kind will do."""
        if self.form:
            return self.form
        unit = " characters" if self.kind in ("text", "path") else ""
        low, high = (f"{bound:.10g}" if bound is not None else "" for bound in (self.low, self.high))
        if low and high:
            words = f"from {low} to {high}{unit}"
        elif low or high:
            words = f"at least {low}{unit}" if low else f"at most {high}{unit}"
        else:
            words = ""
        return f"{words}, or 0 for {self.zero}" if self.zero else words

    def value_in(self, config: object) -> Any:
        """Its value in `config`."""
        value: Any = config
        for name in self.key.split("."):
            value = getattr(value, name)
        return value


_KINDS: Mapping[object, str] = {
    bool: "boolean",
    int: "whole number",
    float: "number",
    str: "text",
    str | None: "text",
    Path: "path",
    tuple[str, ...]: "list of text",
}


@cache
def describe(root: type) -> tuple[Setting, ...]:
    """Every setting of the dataclass `root` and of the dataclasses in it, in their order."""
    found: list[Setting] = []

    def walk(cls: Any, prefix: str) -> None:
        hints = get_type_hints(cls)
        for each in fields(cls):
            hint = hints[each.name]
            if is_dataclass(hint):
                walk(hint, f"{prefix}{each.name}.")
            else:
                found.append(Setting(prefix + each.name, _KINDS[hint], _default(each), **each.metadata))

    walk(root, "")
    return tuple(found)


def _default(each: Field[Any]) -> Callable[[], object]:
    if each.default_factory is not MISSING:
        return each.default_factory
    value = each.default
    return lambda: value


_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def parse(described: Setting, value: object, source: str) -> object:
    """`value` as the setting's type, checked against its range. Raises BadConfig."""
    # A file has types of its own, so text there is text; variables and flags are text only.
    parsed = _from_text(described, value) if isinstance(value, str) and not source.startswith("file ") else value
    kind = described.kind
    fits = {
        "boolean": isinstance(parsed, bool),
        "whole number": isinstance(parsed, int) and not isinstance(parsed, bool),
        "number": isinstance(parsed, (int, float)) and not isinstance(parsed, bool) and math.isfinite(parsed),
        "text": isinstance(parsed, str),
        "path": isinstance(parsed, (str, Path)),
        "list of text": isinstance(parsed, (list, tuple)) and all(isinstance(each, str) for each in parsed),
    }
    if not fits[kind]:
        words = "true or false" if kind == "boolean" else f"a {kind}"
        limit = f" {described.limit}" if described.limit and "number" in kind else ""
        raise _bad(described, value, source, f"must be {words}{limit}")
    if not _in_range(described, parsed):
        raise _bad(described, value, source, f"must be {described.limit}")
    if kind == "number":
        return float(parsed)  # type: ignore[arg-type]
    if kind == "path":
        return _as_path(described, parsed, source)
    return tuple(parsed) if isinstance(parsed, list) else parsed


def _as_path(described: Setting, value: Any, source: str) -> Path:
    if "\0" in str(value):
        raise _bad(described, value, source, "must not contain a zero byte")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise _bad(described, value, source, "names a home directory that does not exist") from error


def _from_text(described: Setting, text: str) -> object:
    """`text` of a variable or a flag as the setting's kind; the text itself where it does not fit."""
    try:
        if described.kind == "whole number":
            return int(text)
        if described.kind == "number":
            return float(text)
    except ValueError:
        return text
    if described.kind == "boolean":
        return _WORDS.get(text.strip().lower(), text)
    if described.kind == "list of text":
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _in_range(described: Setting, value: Any) -> bool:
    size = len(str(value)) if described.kind in ("text", "path") else value
    if described.pattern:
        return re.fullmatch(described.pattern, str(value), re.IGNORECASE) is not None
    if described.kind in ("boolean", "list of text") or (described.zero and size == 0):
        return True
    return (described.low is None or size >= described.low) and (described.high is None or size <= described.high)


def _bad(described: Setting, value: object, source: str, problem: str) -> BadConfig:
    shown = "***" if described.secret else repr(str(value) if isinstance(value, Path) else value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return BadConfig(f"{described.key} = {shown} ({source}): {problem}")


def build(cls: Any, values: Mapping[str, object], prefix: str = "") -> Any:
    """The dataclass `cls` from `values` by key ("server.port"), with the dataclasses in it."""
    hints = get_type_hints(cls)
    parts: dict[str, object] = {}
    for each in fields(cls):
        key = prefix + each.name
        parts[each.name] = build(hints[each.name], values, f"{key}.") if is_dataclass(hints[each.name]) else values[key]
    return cls(**parts)
