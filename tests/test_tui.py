"""The view of a swarm: what it says, and that it fits and stays harmless whatever the nodes say."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from fake_node import three_nodes
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from swarmcpp import tui
from swarmcpp.status import EventRow, NodeRow, RequestRow, SwarmStatus

TEXT = st.text(max_size=50)
COUNT = st.integers(0, 10**15)
RATE = st.floats(0, 1e15)
NODES = st.builds(
    NodeRow,
    id=TEXT,
    name=TEXT,
    addresses=st.lists(TEXT, max_size=2).map(tuple),
    is_self=st.booleans(),
    status=st.sampled_from(["alive", "suspect", "gone"]) | TEXT,
    version=TEXT,
    cpu=TEXT,
    cores=COUNT,
    memory_used=COUNT,
    memory_total=COUNT,
    model=TEXT,
    first_layer=st.integers(0, 100),
    last_layer=st.integers(0, 100),
    n_layers=st.integers(0, 100),
    ranges=st.lists(st.builds("{}-{}".format, COUNT, COUNT) | TEXT, max_size=5).map(tuple),
    role=st.sampled_from(["", "replica", "head", "stage"]),
    slots_busy=COUNT,
    slots=COUNT,
    waiting=COUNT,
    prefill_tps=RATE,
    decode_tps=RATE,
    ttft_s=RATE,
    slot_tokens=COUNT,
    computed_tokens=COUNT,
    blocks=COUNT,
    rtt_s=RATE,
    bytes_per_s=RATE,
    trust=RATE,
)
STATUSES = st.builds(
    SwarmStatus,
    swarm=TEXT,
    nodes=st.lists(NODES, max_size=4).map(tuple),
    requests=st.lists(st.builds(RequestRow, id=TEXT, route=TEXT, seconds=RATE, state=TEXT), max_size=3).map(tuple),
    events=st.lists(st.builds(EventRow, age_s=RATE, text=TEXT), max_size=3).map(tuple),
)


def view(status: SwarmStatus, width: int = 80, *, ascii_only: bool = False) -> list[str]:
    return [line.plain for line in tui.lines(status, width, ascii_only=ascii_only)]


def row(lines: list[str], title: str, name: str) -> dict[str, str]:
    """A row of the table that has the column `title`, by column; of columns without spaces."""
    at = next(at for at, line in enumerate(lines) if title in line.split())
    found = next(line for line in lines[at + 1 :] if line.startswith(name))
    return dict(zip(lines[at].split(), found.split(), strict=False))


@given(STATUSES, st.integers(1, 200), st.booleans())
def test_no_line_is_too_wide_or_steers_the_terminal(status: SwarmStatus, width: int, ascii_only: bool) -> None:
    for line in view(status, width, ascii_only=ascii_only):
        assert cell_len(line) <= width
        assert line.isprintable()
        assert line.isascii() or not ascii_only


@given(STATUSES, st.integers(20, 150))
def test_what_is_printed_is_one_line_for_each(status: SwarmStatus, width: int) -> None:
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(tui.render(status, width))
    assert isinstance(screen.file, io.StringIO)
    assert [each.rstrip() for each in screen.file.getvalue().split("\n")[:-1]] == view(status, width)


def test_three_nodes_at_80_columns() -> None:
    lines = view(three_nodes())
    assert lines[0] == "swarm 1f3a5b7c9d0e1f2a: 2 nodes, 1 running, 0 waiting, 135.2 tok/s"
    assert row(lines, "layers", "laptop") | {"model": "", "TTFT": ""} == {
        "node": "laptop",
        "state": "here",
        "model": "",
        "layers": "████████",
        "held": "0-24/24",
        "slots": "1/4",
        "wait": "0",
        "prefill": "812",
        "tok/s": "45.2",
        "TTFT": "",
    }
    links = row([line.replace(" ms", "ms").replace(" MB", "MB") for line in lines], "RTT", "box")
    assert (links["RTT"], links["rate"], links["trust"]) == ("0.4ms", "112MB/s", "0.83")
    hits = row(lines, "arena", "laptop")
    assert [hits[tier] for tier in ("slot", "arena", "peer", "new")] == ["50%", "20%", "10%", "20%"]
    text = "\n".join(lines)
    assert "peer box" in text and "2048" in text and "3.2 s" in text
    assert lines[-2:] == ["   6 min ago  peer desk joined", "    12 s ago  peer desk is gone"]


def test_columns_are_left_out_and_not_mangled() -> None:
    heads = {width: next(line for line in view(three_nodes(), width) if "slots" in line).split() for width in (40, 200)}
    assert heads[40] == ["node", "state", "layers", "slots", "wait", "tok/s"]
    assert set(heads[40]) < set(heads[200]) and "TTFT" in heads[200]
    assert next(line for line in view(three_nodes(), 40) if "RTT" in line).split() == ["node", "RTT", "rate"]
    wide = next(line for line in view(three_nodes(), 200) if "RTT" in line).split()
    assert wide[-4:] == ["address", "version", "cores", "cpu"]


@pytest.mark.parametrize(
    ("first", "last", "depth", "bar"),
    [(0, 24, 24, "########"), (0, 12, 24, "####...."), (23, 24, 24, ".......#"), (0, 0, 24, ""), (5, 2, 24, "")],
)
def test_layers(first: int, last: int, depth: int, bar: str) -> None:
    assert tui.layer_bar(NodeRow(first_layer=first, last_layer=last, n_layers=depth), 8, True) == bar


@given(st.integers(0, 200), st.integers(1, 200), st.integers(0, 200), st.integers(1, 30))
def test_a_bar_has_its_width_and_shows_something(first: int, held: int, rest: int, width: int) -> None:
    bar = tui.layer_bar(NodeRow(first_layer=first, last_layer=first + held, n_layers=first + held + rest), width, True)
    assert len(bar) == width and "#" in bar


@pytest.mark.parametrize(
    ("ranges", "role", "bar", "held"),
    [
        (("0-6",), "head", "##......", "0-6/24 head"),
        (("0-6", "12-18"), "stage", "##..##..", "0-6,12-18/24"),
        (("12-18", "0-6", "6-9", "14-24"), "", "###.####", "0-9,12-24/24"),
        (("23-24",), "stage", ".......#", "23-24/24"),
        (("0-1", "3-4", "6-7", "9-10", "12-13"), "", "#####...", "0-1,3-4,6-7,.../24"),
        (("x", "9-3", "0-99", "9" * 50 + "-1"), "stage", "", "none/24"),
        ((), "", "..######", "6-24/24"),
    ],
)
def test_the_ranges_that_a_node_holds(ranges: tuple[str, ...], role: str, bar: str, held: str) -> None:
    node = NodeRow(name="box", first_layer=6, last_layer=24, n_layers=24, ranges=ranges, role=role, slots=1)
    assert tui.layer_bar(node, 8, True) == bar
    assert held in "\n".join(view(SwarmStatus(nodes=(node,)), 100))


def test_what_runs_on_a_stage_is_counted_at_its_head() -> None:
    head = NodeRow(id="a", model="m", n_layers=8, ranges=("0-4",), role="head", slots=4, slots_busy=3)
    stage = replace(head, id="b", ranges=("4-8",), role="stage")
    assert view(SwarmStatus(nodes=(head, stage)))[0] == "no swarm: 2 nodes, 3 running, 0 waiting, 0.0 tok/s"


def test_layers_that_nobody_holds_are_told() -> None:
    one = NodeRow(id="a", model="m", n_layers=24, ranges=("2-8",), role="stage", slots=4)
    two = replace(one, id="b", ranges=("6-12", "13-20"))
    told = tui.reason(SwarmStatus(nodes=(one, two)))
    assert told == "no answers: layers 0-2, 12-13, 20-24 of m are on no node"
    assert tui.reason(SwarmStatus(nodes=(replace(one, ranges=("0-8",)), replace(two, ranges=("8-24",))))) == ""
    assert tui.reason(SwarmStatus(nodes=(one, replace(two, role="replica", ranges=("0-24",))))) == ""


def test_names_of_peers_are_only_text() -> None:
    status = three_nodes()
    evil = replace(status.nodes[1], name="\x1b]0;x\x07[red]b\u202eox\n\t[/red]")
    screen = Console(file=io.StringIO(), width=80, color_system=None)
    screen.print(tui.render(replace(status, nodes=(evil,)), 80))
    assert isinstance(screen.file, io.StringIO)
    assert "]0;x[red]b" in screen.file.getvalue() and "\x1b" not in screen.file.getvalue()
    assert "\u202e" not in screen.file.getvalue()


def test_only_so_many_rows() -> None:
    many = tuple(NodeRow(id=str(at), name=f"n{at:03}", slots=1) for at in range(100))
    lines = view(SwarmStatus(nodes=many, requests=(RequestRow(),) * 50, events=(EventRow(),) * 20))
    assert "and 84 more nodes" in lines and "and 38 more requests" in lines
    assert len(lines) < 70


def test_no_swarm() -> None:
    assert view(SwarmStatus()) == ["no swarm: 0 nodes, 0 running, 0 waiting, 0.0 tok/s"]


HERE, BOX = three_nodes().nodes[:2]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (BOX, ""),
        (replace(BOX, status="gone", slots=0), ""),
        (replace(BOX, status="suspect"), "box does not answer"),
        (replace(BOX, slots_busy=8, waiting=3), "all 8 slots of box are busy and 3 wait"),
        (replace(BOX, slots=0), "box has no slots"),
        (replace(BOX, slots_busy=8, decode_tps=8.0), "box generates 1.0 tok/s per request"),
        (replace(BOX, bytes_per_s=6e5), "600 kB/s to box"),
    ],
)
def test_why_it_is_slow(changed: NodeRow, says: str) -> None:
    found = tui.reason(SwarmStatus(nodes=(HERE, changed)))
    assert says in found and bool(says) == bool(found)
    assert cell_len(found) <= 95


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (tui.time_text(0.0), "-"),
        (tui.time_text(0.0004), "0.4 ms"),
        (tui.time_text(0.0354), "35 ms"),
        (tui.time_text(1.254), "1.25 s"),
        (tui.time_text(254.4), "254 s"),
        (tui.rate_text(0.0), "-"),
        (tui.rate_text(850e3), "850 kB/s"),
        (tui.rate_text(1.25e6), "1.2 MB/s"),
        (tui.rate_text(112e6), "112 MB/s"),
        (tui.age_text(59), "59 s"),
        (tui.age_text(3700), "1 h"),
        (tui.age_text(200000), "2 d"),
    ],
)
def test_quantities(text: str, shown: str) -> None:
    assert text == shown
