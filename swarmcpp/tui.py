"""The rich view of a SwarmStatus: lines that fit the width, whatever the nodes call themselves.

Nothing here depends on colour: a style only repeats what the text says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.text import Text

from swarmcpp.status import EventRow, NodeRow, RequestRow, SwarmStatus
from swarmcpp.telemetry import printable

MAX_NODES = 16
MAX_REQUESTS = 12
MAX_EVENTS = 8
"""Rows of a screen; `--json` tells of all."""
WIDE = 110
"""Columns from which there is room for air."""

SLOW_DECODE_TPS = 3.0
"""Of one stream: about the pace of reading aloud; people notice what is below."""
SLOW_LINK = 1.25e6
"""Bytes/s, 10 Mbit/s: reading a prompt anew is mostly faster than its KV over such a link."""

MAX_RANGES = 3
"""Ranges of layers of one node that are told as numbers."""

_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})", re.ASCII)

_STYLES = {"suspect": "yellow", "gone": "dim red", "here": "bold", "queued": "yellow"}


@dataclass(slots=True)
class Column:
    """A column of a table: the lower its `rank`, the later it is left out. Text columns shrink down to `least`."""

    title: str
    cells: list[str]
    rank: int
    least: int | None = None
    """None: a column that is of no use when cut; its text is right-aligned."""
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = max(cell_len(text) for text in (self.title, *self.cells))

    @property
    def slack(self) -> int:
        """Cells that it can do without."""
        return 0 if self.least is None else max(0, self.width - self.least)

    def cell(self, text: str) -> str:
        """`text` at exactly the column's width."""
        if self.least is None:
            return " " * (self.width - cell_len(text)) + text
        return cut(text, self.width) + " " * (self.width - min(self.width, cell_len(text)))


def render(status: SwarmStatus, width: int, *, ascii_only: bool = False) -> RenderableType:
    """The whole view, no line wider than `width` cells."""
    return Group(*lines(status, width, ascii_only=ascii_only))


def lines(status: SwarmStatus, width: int, *, ascii_only: bool = False) -> list[Text]:
    """The view line by line; two views that look the same are equal."""
    nodes = sorted(status.nodes, key=lambda node: (not node.is_self, node.status == "gone", node.name, node.id))
    found = [Text(_summary(status), "bold")]
    why = reason(status)
    if why:
        found.append(Text(why, "yellow"))
    shown = nodes[:MAX_NODES]
    styles = [_STYLES.get(_state(node), "") for node in shown]
    for columns in (_work(shown, width, ascii_only), _links(shown)) if shown else ():
        found += [Text(), *_table(columns, styles, width)]
    if len(nodes) > MAX_NODES:
        found.append(Text(f"and {len(nodes) - MAX_NODES} more nodes", "dim"))
    if status.requests:
        running = status.requests[:MAX_REQUESTS]
        found += [Text(), *_table(_requests(running), [_STYLES.get(row.state, "") for row in running], width)]
        if len(status.requests) > MAX_REQUESTS:
            found.append(Text(f"and {len(status.requests) - MAX_REQUESTS} more requests", "dim"))
    if status.events:
        found.append(Text())
        found += [Text(_event(row), "dim") for row in status.events[-MAX_EVENTS:]]
    return [_fit(line, width, ascii_only) for line in found]


def notice(text: str, width: int, *, ascii_only: bool = False) -> Text:
    """A line that stands out."""
    return _fit(Text(clean(text, width), "yellow"), width, ascii_only)


def reason(status: SwarmStatus) -> str:
    """One line on why requests may be slow, as far as the data tells; the worst first, empty when all is well."""
    for node in status.nodes:
        if node.status == "suspect":
            return f"slow? {_name(node)} does not answer at the moment; its requests go on elsewhere if it stays away"
    alive = [node for node in status.nodes if node.status == "alive"]
    for node in alive:
        if node.waiting and node.slots_busy >= node.slots > 0:
            return f"slow? all {node.slots} slots of {_name(node)} are busy and {node.waiting} wait for one"
    for node in alive:
        if not node.slots:
            return f"slow? {_name(node)} has no slots: its model is loading, or its engine failed"
    if missing := _missing(alive):
        return missing
    for node in alive:
        pace = node.decode_tps / max(1, node.slots_busy)
        if 0 < pace < SLOW_DECODE_TPS:
            return f"slow? {_name(node)} generates {pace:.1f} tok/s per request; a smaller model would be faster"
    for node in alive:
        if 0 < node.bytes_per_s < SLOW_LINK:
            return f"slow? {rate_text(node.bytes_per_s)} to {_name(node)}: prompts are read anew, not fetched"
    return ""


def _missing(alive: Sequence[NodeRow]) -> str:
    """Which layers are on no node, of a model that has stages and nobody who answers with it."""
    answered = {node.model for node in alive if node.role in ("replica", "head")}
    for model, depth in sorted({(node.model, node.n_layers) for node in alive if node.role == "stage"}):
        nodes = [node for node in alive if (node.model, node.n_layers) == (model, depth)]
        at, gaps = 0, []
        for first, last in sorted(each for node in nodes for each in held_ranges(node)):
            gaps += [f"{at}-{first}"] * (at < first)
            at = max(at, last)
        gaps += [f"{at}-{depth}"] * (at < depth)
        if gaps and model not in answered:
            return f"no answers: layers {', '.join(gaps[:MAX_RANGES])} of {clean(model, 30)} are on no node"
    return ""


def _summary(status: SwarmStatus) -> str:
    alive = [node for node in status.nodes if node.status != "gone"]
    swarm = f"swarm {clean(status.swarm, 16)}" if status.swarm else "no swarm"
    # What runs on a stage is counted where it is answered.
    answering = [node for node in alive if node.role != "stage"]
    busy, waiting = (sum(getattr(node, name) for node in answering) for name in ("slots_busy", "waiting"))
    nodes = f"{len(alive)} node{'' if len(alive) == 1 else 's'}"
    return f"{swarm}: {nodes}, {busy} running, {waiting} waiting, {sum(node.decode_tps for node in alive):.1f} tok/s"


def _work(nodes: Sequence[NodeRow], width: int, ascii_only: bool) -> list[Column]:
    bar = 20 if width >= WIDE else 8 if width >= 80 else 4
    return [
        Column("node", [_name(node) for node in nodes], 0, least=6),
        Column("state", [_state(node) for node in nodes], 1, least=7),
        Column("model", [clean(node.model, 40) for node in nodes], 7, least=6),
        Column("layers", [layer_bar(node, bar, ascii_only) for node in nodes], 5),
        Column("held", [_held(node) for node in nodes], 9),
        Column("slots", [f"{node.slots_busy}/{node.slots}" for node in nodes], 2),
        Column("wait", [str(node.waiting) for node in nodes], 3),
        Column("prefill", [_tps(node.prefill_tps) for node in nodes], 6),
        Column("tok/s", [_tps(node.decode_tps) for node in nodes], 4),
        Column("TTFT", [time_text(node.ttft_s) for node in nodes], 8),
    ]


def _links(nodes: Sequence[NodeRow]) -> list[Column]:
    hits = [shares(node) for node in nodes]
    return [
        Column("node", [_name(node) for node in nodes], 0, least=6),
        Column("RTT", [time_text(node.rtt_s) for node in nodes], 1),
        Column("rate", ["-" if node.is_self else rate_text(node.bytes_per_s) for node in nodes], 2),
        Column("trust", ["-" if node.is_self else f"{node.trust:.2f}" for node in nodes], 4),
        *(Column(title, [hit[at] for hit in hits], 3) for at, title in enumerate(("slot", "arena", "peer", "new"))),
        Column("blocks", [str(node.blocks) for node in nodes], 6),
        Column("memory", [_memory(node) for node in nodes], 5),
        Column("address", [clean(next(iter(node.addresses), ""), 47) for node in nodes], 7, least=15),
        Column("version", [clean(node.version, 16) for node in nodes], 9, least=5),
        Column("cores", [str(node.cores or "-") for node in nodes], 8),
        Column("cpu", [clean(node.cpu, 40) for node in nodes], 10, least=12),
    ]


def _requests(rows: Sequence[RequestRow]) -> list[Column]:
    return [
        Column("request", [clean(row.id, 40) for row in rows], 1, least=12),
        Column("model", [clean(row.model, 40) for row in rows], 5, least=6),
        Column("state", [clean(row.state, 8) for row in rows], 2, least=7),
        Column("route", [clean(row.route, 100) for row in rows], 0, least=10),
        Column("prompt", [str(row.prompt_tokens) for row in rows], 4),
        Column("tokens", [str(row.generated) for row in rows], 3),
        Column("guessed", [_guessed(row) for row in rows], 7),
        Column("time", [f"{row.seconds:.1f} s" for row in rows], 6),
    ]


def _guessed(row: RequestRow) -> str:
    """Guesses that were right, of all."""
    return f"{row.accepted}/{row.drafted}" if row.drafted else "-"


def _event(row: EventRow) -> str:
    return f"{age_text(row.age_s):>8} ago  {clean(row.text, 120)}"


def _table(columns: list[Column], styles: Sequence[str], width: int) -> Iterator[Text]:
    gap = 2 if width >= WIDE else 1
    kept = fit(columns, width, gap)
    yield Text((" " * gap).join(column.cell(column.title) for column in kept), "bold underline")
    for at, style in enumerate(styles):
        yield Text((" " * gap).join(column.cell(column.cells[at]) for column in kept), style)


def fit(columns: list[Column], width: int, gap: int) -> list[Column]:
    """The columns that fit into `width` with `gap` between: text shrunk as far as it goes, then the highest rank (with
    all columns that have it) left out."""
    kept = list(columns)
    while True:
        over = sum(column.width for column in kept) + gap * (len(kept) - 1) - width
        worst = max(column.rank for column in kept)
        if over <= sum(column.slack for column in kept) or not worst:
            break
        kept = [column for column in kept if column.rank < worst]
    while over > 0 and (widest := max(kept, key=lambda column: column.slack)).slack:
        widest.width -= 1
        over -= 1
    return kept


def held_ranges(node: NodeRow) -> list[tuple[int, int]]:
    """The ranges of layers that the node holds, those that follow one another joined; what is no range is left out."""
    told = [(int(found[1]), int(found[2])) for each in node.ranges if (found := _RANGE.fullmatch(each))]
    joined: list[tuple[int, int]] = []
    for first, last in sorted(told or [(node.first_layer, node.last_layer)]):
        if not 0 <= first < last <= node.n_layers:
            continue
        if joined and first <= joined[-1][1]:
            first, last = joined[-1][0], max(last, joined.pop()[1])
        joined.append((first, last))
    return joined


def layer_bar(node: NodeRow, width: int, ascii_only: bool) -> str:
    """The layers that the node holds as part of its model's depth; empty when it tells none."""
    ranges, depth = held_ranges(node), node.n_layers
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    cells = [empty] * width if ranges else []
    for first, last in ranges:
        start = first * width // depth
        # However few the layers are, there is something to see.
        end = max(start + 1, last * width // depth)
        cells[start:end] = full * (end - start)
    return "".join(cells)


def _held(node: NodeRow) -> str:
    if not node.n_layers:
        return "-"
    ranges = held_ranges(node)
    told = [f"{first}-{last}" for first, last in ranges[:MAX_RANGES]] + ["..."] * (len(ranges) > MAX_RANGES)
    return f"{','.join(told) or 'none'}/{node.n_layers}{' head' if node.role == 'head' else ''}"


def shares(node: NodeRow) -> tuple[str, str, str, str]:
    """Shares of its prompt tokens by where their KV came from: slot, arena, peer, computed."""
    counts = (node.slot_tokens, node.arena_tokens, node.peer_tokens, node.computed_tokens)
    total = sum(counts)
    slot, arena, peer, new = (f"{100 * count / total:.0f}%" if total else "-" for count in counts)
    return slot, arena, peer, new


def clean(text: str, size: int) -> str:
    """Text of another machine as a line of at most `size` cells: nothing in it can steer or rearrange the terminal."""
    visible = "".join(each if each.isprintable() else " " for each in printable(text[: 4 * size]))
    return cut(" ".join(visible.split())[:size], size)


def cut(text: str, width: int) -> str:
    """`text` cut to `width` cells; the end shows that something is missing."""
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + "~"


def _fit(line: Text, width: int, ascii_only: bool) -> Text:
    text = cut(line.plain.rstrip(), width)
    if ascii_only:
        text = "".join(each if each.isascii() else "?" * cell_len(each) for each in text)
    return Text(text, line.style, no_wrap=True, overflow="crop")


def _name(node: NodeRow) -> str:
    return clean(node.name, 24) or clean(node.id, 16) or "?"


def _state(node: NodeRow) -> str:
    return "here" if node.is_self else clean(node.status, 8)


def _memory(node: NodeRow) -> str:
    if not node.memory_total:
        return "-"
    return f"{node.memory_used / 1e9:.1f}/{node.memory_total / 1e9:.0f} GB"


def _tps(rate: float) -> str:
    return "-" if not rate else f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def time_text(seconds: float) -> str:
    """A short time: 0.4 ms, 35 ms, 1.25 s; - for none."""
    if not seconds:
        return "-"
    if seconds < 0.01:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def rate_text(bytes_per_s: float) -> str:
    """A link's rate: 850 kB/s, 112 MB/s; - when it is not known."""
    if not bytes_per_s:
        return "-"
    if bytes_per_s < 1e6:
        return f"{bytes_per_s / 1e3:.0f} kB/s"
    return f"{bytes_per_s / 1e6:.1f} MB/s" if bytes_per_s < 1e7 else f"{bytes_per_s / 1e6:.0f} MB/s"


def age_text(seconds: float) -> str:
    """How long ago, as coarse as people say it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
