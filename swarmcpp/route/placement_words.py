"""A placement in plain sentences, for `swarmcpp plan`."""

from __future__ import annotations

from typing import Final

from swarmcpp.route.costs import PROMPT_TOKENS, Pipeline, PlacedStage, Placement

NEAR: Final = 0.01
"""Relative difference of rates that is called none."""


def explain(placement: Placement, before: Placement | None = None) -> list[str]:
    """What each machine holds and why, what is missing, what to expect, and against `before` (the placement without
    some machine, or that of now) what changes, one sentence a line."""
    lines = [line for pipeline in placement.pipelines for line in _pipeline(pipeline, placement)]
    lines += [
        f"{stage.name} holds {_layers(stage)} ({size(stage.n_bytes)}), ready for the machine that brings the rest."
        for stage in placement.partial
    ]
    lines += [f"{spare.name} stays out: {spare.why}." for spare in placement.spare]
    if placement.pipelines:
        lines.append(_expected(placement))
    else:
        lines += _missing(placement)
    if placement.kept:
        lines.append(
            "Machines keep the layers they hold: another layout would be faster, but not by enough to move for."
        )
    return lines + (_changes(placement, before) if before is not None else [])


def size(n_bytes: int) -> str:
    """Bytes as people read them, in powers of ten: "1.25 GB", "310 MB"."""
    return f"{n_bytes / 10**9:.2f} GB" if n_bytes >= 10**9 else f"{-(-n_bytes // 10**6)} MB"


def _pipeline(pipeline: Pipeline, placement: Placement) -> list[str]:
    if len(pipeline.stages) == 1:
        stage = pipeline.stages[0]
        return [
            f"{stage.name} holds the whole model ({size(stage.n_bytes)}) and answers alone, {pipeline.tps:.3g} "
            f"tokens/s: what one machine can hold is never split."
        ]
    names = " -> ".join(stage.name for stage in pipeline.stages)
    slowest = max(pipeline.stages, key=lambda stage: stage.pass_s)
    lines = [
        f"{names} answer together, {pipeline.tps:.3g} tokens/s: none of them can hold the whole model; "
        f"the slowest stage is {slowest.name}, {slowest.pass_s * 1000:.3g} ms a token, "
        f"and the links take {pipeline.hops_s * 1000:.3g} ms."
    ]
    return lines + [
        f"{stage.name} holds {_layers(stage)} ({size(stage.n_bytes)}"
        f"{', output head included' if stage.last == placement.shape.n_layers else ''}), "
        f"{stage.pass_s * 1000:.3g} ms a token."
        for stage in pipeline.stages
    ]


def _expected(placement: Placement) -> str:
    one = max(pipeline.one_tps for pipeline in placement.pipelines)
    ttft = min(pipeline.ttft_s for pipeline in placement.pipelines)
    return (
        f"Expected: {one:.3g} tokens/s for one user, {placement.tps:.3g} tokens/s for all, "
        f"{ttft:.3g} s to the first token of a prompt of {PROMPT_TOKENS}."
    )


def _missing(placement: Placement) -> list[str]:
    ranges = ", ".join(_span(first, last) for first, last in placement.missing)
    lines = (
        [f"The model cannot run: nobody can hold {ranges} of its {placement.shape.n_layers} layers."] if ranges else []
    )
    return [
        *lines,
        f"Memory is what is missing: {size(placement.missing_bytes)} more, on one machine that joins for each of these "
        f"ranges or on several, or a smaller --ctx-size or fewer --slots.",
    ]


def _changes(placement: Placement, before: Placement) -> list[str]:
    names = {stage.node: stage.name for stage in placement.stages} | {s.node: s.name for s in placement.spare}
    old = {stage.node: (stage.first, stage.last) for stage in before.stages}
    known = old.keys() | {spare.node for spare in before.spare}
    lines = []
    for stage in placement.stages:
        was = old.get(stage.node)
        if was is not None and was != (stage.first, stage.last):
            lines.append(f"{stage.name} moves from {_span(*was)} to {_layers(stage)}.")
    lines += [f"{s.name} lets go of {_span(*old[s.node])}." for s in placement.spare if s.node in old]
    added = [name for node, name in names.items() if node not in known]
    gone = [stage.name for stage in before.stages if stage.node not in names]
    cause = f"Adding {', '.join(added)}" if added else f"Without {', '.join(gone)}" if gone else "This layout"
    return [*lines, f"{cause} {_effect(placement, before)}."]


def _effect(placement: Placement, before: Placement) -> str:
    if not before.pipelines:
        return "makes the model run" if placement.pipelines else "does not make the model run yet"
    if not placement.pipelines:
        return "the model runs no more"
    rates = f"{before.tps:.3g} to {placement.tps:.3g} tokens/s for all"
    change = placement.tps / before.tps - 1
    if abs(change) < NEAR:
        return f"changes nothing for the speed of answers ({rates})"
    return f"makes answers {'faster' if change > 0 else 'slower'} by {abs(change):.0%} ({rates})"


def _layers(stage: PlacedStage) -> str:
    return _span(stage.first, stage.last)


def _span(first: int, last: int) -> str:
    return f"layer {first}" if last - first == 1 else f"layers {first}-{last}"
