"""Plans for a model: what is asked, what is known of the swarm, and what comes out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcpp.errors import BadRequest
from swarmcpp.models.inspect import inspect
from swarmcpp.models.synthetic import Shape, write_model
from swarmcpp.node.placing import MAX_ADDED, PlannedModel, memory_text, plan
from swarmcpp.node.view import MAX_CHAIN, chain_text
from swarmcpp.peers import Capability, Load, ModelOffer, ObservedLatency, StageOffer
from swarmcpp.pipeline.chains import missing_text
from swarmcpp.pipeline.contract import StageRef
from swarmcpp.route.costs import stage_bytes
from swarmcpp.route.parallax import Stage

FINGERPRINT, OTHER = bytes(range(32)), bytes(32)
N_LAYERS = 8
GB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    """A model of which each layer takes more than what an engine needs beside layers."""
    shape = Shape("wide", "llama", N_LAYERS, 1024, 8, 8, 4096, 256, 2048)
    path = write_model(tmp_path_factory.mktemp("model") / "wide.gguf", shape, quant="Q8_0")
    return PlannedModel("wide", inspect(path), FINGERPRINT, 1024, 8)


def node(number: int, memory: int, **changes: object) -> Capability:
    fields: dict[str, object] = {
        "node": f"{number:016x}",
        "boot": 1,
        "name": f"n{number}",
        "addresses": (),
        "pub_port": 1,
        "version": "1",
        "state": "ready",
        "cpu": "",
        "cores": 1,
        "memory_total": 64 * GB,
        "memory_free": memory,
        "models": (),
        "memory_model": memory,
    }
    return Capability(**(fields | changes))  # type: ignore[arg-type]


def stage(first: int, last: int, fingerprint: bytes = FINGERPRINT, ms: float = 2.0) -> StageOffer:
    curve = ((1, ms * (last - first) / 1000), (64, 10 * ms * (last - first) / 1000))
    return StageOffer("wide", fingerprint, first, last, N_LAYERS, 1024, 8, 8, pass_s=curve)


def offer(fingerprint: bytes = FINGERPRINT, name: str = "wide") -> ModelOffer:
    return ModelOffer(name, fingerprint, b"", "llama", "", 1, 1, 256, 2048, N_LAYERS, 0, N_LAYERS, 0, 1024, 8)


def room(model: PlannedModel, layers: int) -> int:
    """Memory for so many layers, at either end."""
    shape = model.shape()
    return max(stage_bytes(shape, 0, layers, 8, 1024), stage_bytes(shape, N_LAYERS - layers, N_LAYERS, 8, 1024))


def halves(model: PlannedModel) -> list[Capability]:
    return [
        node(1, room(model, 4), stages=(stage(0, 4),)),
        node(2, room(model, 4), stages=(stage(4, 8),), observed_latencies=(ObservedLatency(f"{1:016x}", 0.002),)),
    ]


def test_two_machines_that_hold_it_together(model: PlannedModel) -> None:
    found = plan(model, halves(model), ())
    assert [(row.name, row.pipeline, row.first, row.last) for row in found.rows] == [("n1", 1, 0, 4), ("n2", 1, 4, 8)]
    assert 0 < found.rates.one_tps < found.rates.all_tps and found.rates.ttft_s > 0
    assert found.before == found.rates
    assert found.sentences[0].startswith("n1 -> n2 answer together")
    assert (found.model, found.n_layers, found.ctx_size, found.slots) == ("wide", N_LAYERS, 1024, 8)
    assert (found.missing, found.missing_bytes, found.added) == ((), 0, ())


def test_one_machine_alone_lacks_memory_and_another_makes_it_run(model: PlannedModel) -> None:
    alone = halves(model)[:1]
    found = plan(model, alone, ())
    assert found.missing and found.missing_bytes > 0 and found.rates.all_tps == found.rates.ttft_s == 0.0
    assert [row.pipeline for row in found.rows] == [0]
    assert any("Memory is what is missing" in each for each in found.sentences)
    found = plan(model, alone, ["desk=1G"])
    assert found.sentences[-1] == "Adding desk makes the model run."
    assert found.before.all_tps == 0.0 < found.rates.all_tps


def test_each_machine_is_judged_by_itself_and_all_together(model: PlannedModel) -> None:
    found = plan(model, halves(model), ["16G", "1M", "16G"])
    assert found.added == ("new-16G", "new-1M", "new-16G-2")
    assert [each.split(" makes")[0].split(" changes")[0] for each in found.sentences[-4:]] == [
        "Adding new-16G",
        "Adding new-1M",
        "Adding new-16G-2",
        "Adding new-16G, new-16G-2, new-1M",
    ]
    assert "makes answers faster" in found.sentences[-4] and "changes nothing" in found.sentences[-3]
    assert any(each.startswith("new-1M stays out") for each in found.sentences)


def test_a_new_machine_is_as_fast_as_the_median_of_the_known(model: PlannedModel) -> None:
    whole = [
        node(number, 16 * GB, models=(offer(),), load=Load(decode_tps=1000 / ms / N_LAYERS))
        for number, ms in enumerate((1.0, 2.0, 50.0), 1)
    ]
    found = {row.name: row.pass_s for row in plan(model, whole, ["16G"]).rows}
    assert found["new-16G"] == pytest.approx(found["n2"])


def test_a_node_that_serves_nothing_can_be_named(model: PlannedModel) -> None:
    nodes = [*halves(model), node(3, 16 * GB)]
    found = plan(model, nodes, ["n3"])
    assert found.added == ("n3",) and found.sentences[-1].startswith("Adding n3 makes answers faster")
    assert plan(model, nodes, [nodes[2].node]).rates == found.rates == plan(model, nodes, ()).rates
    assert found.before == plan(model, nodes[:2], ()).rates


def test_what_nobody_measured_is_said(model: PlannedModel) -> None:
    assert "measured" in plan(model, [node(1, 16 * GB)], ()).sentences[0]
    assert "measured" not in " ".join(plan(model, halves(model), ()).sentences)


def test_a_node_of_another_model_has_no_part(model: PlannedModel) -> None:
    nodes = [*halves(model), node(3, 16 * GB, models=(offer(OTHER, "other"),))]
    assert {row.name for row in plan(model, nodes, ()).rows} == {"n1", "n2"}
    with pytest.raises(BadRequest, match="'n3': that node serves 'other' already"):
        plan(model, nodes, ["n3"])


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (
            ["nobody"],
            r"'nobody': is no size and no node of the swarm \(nodes that serve nothing: n3\); say a",
        ),
        (["n1"], "'n1': that node serves 'wide' already"),
        (["n3=16G"], "'n3' is a node of the swarm; say 'n3' alone"),
        (["0"], "'0': is no machine to add"),
        (["=16G"], "'=16G': is no machine to add"),
        (["desk="], "'desk=': is no machine to add"),
        (["desk=auto"], "'desk=auto': is no machine to add"),
        (["99999999T"], "'99999999T': is no machine to add"),
        (["desk=1G", "desk=2G"], "'desk=2G': is named twice"),
        (["n3", "n3"], "'n3': is named twice"),
        (["1G"] * (MAX_ADDED + 1), "17 machines to add; a plan takes 16"),
    ],
)
def test_what_is_no_machine_is_refused(model: PlannedModel, added: list[str], says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        plan(model, [*halves(model), node(3, GB)], added)
    assert caught.value.param == "with" and "\n" not in str(caught.value)


def test_of_nodes_with_one_name_the_id_says_which(model: PlannedModel) -> None:
    nodes = [*halves(model), node(3, 16 * GB), node(4, 16 * GB, name="n3")]
    with pytest.raises(BadRequest, match=f"2 nodes have that name; say which by its id: {3:016x}, {4:016x}"):
        plan(model, nodes, ["n3"])
    assert plan(model, nodes, [f"{4:016x}"]).added == ("n3",)


@given(st.lists(st.text(max_size=30), max_size=3))
def test_any_text_gives_a_plan_or_a_refusal_in_one_line(model: PlannedModel, added: list[str]) -> None:
    try:
        found = plan(model, halves(model), added)
    except BadRequest as error:
        assert str(error).isprintable()
    else:
        assert len(found.added) == len(added)


# -- what is missing ---------------------------------------------------------------------------------------------------


def text(model: PlannedModel, nodes: list[Capability]) -> str:
    shape = model.shape()
    stages = [Stage(each.node, part.first, part.last) for each in nodes for part in each.stages]
    return missing_text(stages, N_LAYERS, lambda missing: memory_text(shape, nodes, missing))


def test_missing_layers_are_named_and_missing_memory_apart(model: PlannedModel) -> None:
    one, two = halves(model)
    nowhere = "layers 4-8 of 8 are on no node that runs now; "
    assert text(model, [one]).startswith(f"{nowhere}memory is what is missing: they need ")
    roomy = text(model, [replace(one, memory_model=16 * GB)])
    assert roomy.startswith(f"{nowhere}the swarm has room for them")
    assert "memory is what is missing" not in roomy and "swarmcpp join" in roomy
    assert text(model, [replace(one, stages=(stage(1, 3),))]).startswith("layers 0-1, 3-8 of 8 are on no node")
    across = text(model, [one, replace(two, stages=(stage(3, 8),))])
    assert "every layer is there, but in ranges that do not follow one another (0-4, 3-8 of 8)" in across
    assert "try again in a moment" in text(model, [one, two])


# -- routes ------------------------------------------------------------------------------------------------------------


def chain(*bounds: int) -> tuple[StageRef, ...]:
    parts = enumerate(pairwise(bounds), 1)
    return tuple(StageRef(f"{number:016x}", FINGERPRINT, a, b, bounds[-1]) for number, (a, b) in parts)


def test_a_chain_is_told_by_names_and_layers() -> None:
    names = {f"{1:016x}": "alpha", f"{2:016x}": "beta"}
    assert chain_text(chain(0, 12, 24), names) == "stages alpha 0-12, beta 12-24"
    assert chain_text(chain(0, 12, 24), {}) == f"stages {1:016x} 0-12, {2:016x} 12-24"


@given(st.text(max_size=100), st.integers(1, 64))
def test_a_route_is_fit_for_a_header_whatever_nodes_call_themselves(name: str, count: int) -> None:
    stages = chain(*range(0, count * 1000 + 1, 1000))
    told = chain_text(stages, {each.node: name for each in stages})
    assert len(told) <= 200 and told.isascii() and told.isprintable()
    parts = told.removeprefix("stages ").split(", ")
    assert len(parts) == min(count, MAX_CHAIN + (count > MAX_CHAIN))
    assert parts[0].endswith(" 0-1000") and parts[-1].endswith(f"-{count * 1000}")
    if count > MAX_CHAIN:
        assert parts[-2] == f"{count - MAX_CHAIN} more"
