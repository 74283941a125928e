"""The error tree: drawn as it is, unique on the wire, rebuilt on the other side."""

from __future__ import annotations

import inspect
import re

import pytest

from swarmcpp import errors
from swarmcpp.errors import QueueFull, StartupError, SwarmError, by_code, revive

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SwarmError)]
DRAWN = re.compile(r"^    (?P<branch>[│ ├└─]*)(?P<name>[A-Z]\w+) +(?P<rest>.+)$", re.MULTILINE)


def drawn() -> dict[str, tuple[int, str]]:
    """Name -> (depth, what stands behind it), from the docstring."""
    assert errors.__doc__
    return {one["name"]: (len(one["branch"]) // 4, one["rest"]) for one in DRAWN.finditer(errors.__doc__)}


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert by_code() == {cls.code: cls for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_drawn_where_it_is(cls: type[SwarmError]) -> None:
    depth, rest = drawn()[cls.__name__]
    assert depth == len(cls.__mro__) - len(SwarmError.__mro__)
    if issubclass(cls, StartupError):
        assert cls.exit_code == 2
        return
    status, code = rest.split()[:2]
    assert (int(status), code) == (cls.status, cls.code)


def test_nothing_else_is_drawn() -> None:
    assert set(drawn()) == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_statuses_and_kinds_fit_openai(cls: type[SwarmError]) -> None:
    assert 400 <= cls.status < 600
    assert cls.kind.endswith("_error")
    assert (cls.kind == "server_error") == (cls.status in (499, 500, 502))


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_is_rebuilt_from_its_code(cls: type[SwarmError]) -> None:
    error = revive(cls.code, "what happened")
    assert type(error) is cls
    assert str(error) == "what happened"
    assert error.param is None


def test_an_unknown_code_is_still_an_error() -> None:
    error = revive("from_the_future", "new")
    assert type(error) is SwarmError
    assert str(error) == "new"


def test_a_full_queue_says_when_to_come_back() -> None:
    error = revive(QueueFull.code, "full")
    assert isinstance(error, QueueFull)
    assert error.retry_after > 0
