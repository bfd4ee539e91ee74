"""Every network by every layout: equal to the local engine, or refused with a reason."""

from __future__ import annotations

from dataclasses import replace

from distributed.megatron_cases import (
    GLOBAL,
    LENGTH,
    MICRO,
    NETWORKS,
    OVERLAP,
    PLAIN,
    SP,
    SPLIT,
    Layout,
)

from mpotrain.data.config import DataConfig, SourceConfig
from mpotrain.data.objective_config import CausalConfig, MaskedConfig, SpanCorruptionConfig
from mpotrain.engine.config import expert_problems
from mpotrain.engine.megatron.problems import Layout as Asked
from mpotrain.engine.megatron.problems import megatron_problems
from mpotrain.parallel.plan import ParallelConfig

LAYOUTS: dict[str, Layout] = {
    "one rank": Layout(engine=PLAIN),
    "tp2": Layout(ParallelConfig(tensor=2), PLAIN),
    "tp2+sp": Layout(SP, SPLIT),
    "tp4+sp": Layout(replace(SP, tensor=4), PLAIN),
    "pp2": Layout(ParallelConfig(pipeline=2), PLAIN),
    "pp2+vp2": Layout(ParallelConfig(pipeline=2, virtual_pipeline=2), SPLIT),
    "pp4": Layout(ParallelConfig(pipeline=4), PLAIN),
    "tp2+pp2+sp": Layout(replace(SP, pipeline=2), SPLIT),
    "cp2": Layout(ParallelConfig(context=2), PLAIN),
    "tp2+cp2+sp": Layout(replace(SP, context=2), SPLIT),
    "dp2": Layout(ParallelConfig(data=2), PLAIN),
    "dp2+distributed optimizer+overlap": Layout(ParallelConfig(data=2), OVERLAP),
    "dp2+pp2+distributed optimizer+overlap": Layout(ParallelConfig(data=2, pipeline=2), OVERLAP),
    "dp2+tp2+sp+distributed optimizer+overlap": Layout(replace(SP, data=2), OVERLAP),
    "ep2": Layout(ParallelConfig(expert=2), PLAIN),
    "ep2+allgather": Layout(ParallelConfig(expert=2), replace(SPLIT, moe_dispatcher="allgather")),
    "ep2+pp2": Layout(ParallelConfig(expert=2, pipeline=2), SPLIT),
    "tp2+sp+ep2": Layout(replace(SP, expert=2), SPLIT),
    "tp2+sp+ep2+etp2": Layout(replace(SP, expert=2, expert_tensor=2), PLAIN),
    "tp2+sp+ep2+etp2+distributed optimizer+overlap": Layout(
        replace(SP, expert=2, expert_tensor=2), OVERLAP
    ),
    "recompute": Layout(engine=PLAIN, recompute=True),
    "tp2+pp2+sp+recompute": Layout(replace(SP, pipeline=2), PLAIN, recompute=True),
    "tp2+sp+ep2+recompute": Layout(replace(SP, expert=2), SPLIT, recompute=True),
    "cached weights": Layout(engine=replace(PLAIN, cache_weights=True)),
    "cached weights+recompute": Layout(engine=replace(OVERLAP, cache_weights=True), recompute=True),
    "tp2+pp2+sp+cached weights": Layout(
        replace(SP, pipeline=2), replace(OVERLAP, cache_weights=True)
    ),
}
OBJECTIVES = {
    "gpt-ttm": CausalConfig(),
    "gpt-moe": CausalConfig(),
    "mpobert": MaskedConfig(mask_id=1, cls_id=2, sep_id=3),
    "t5-moe": SpanCorruptionConfig(first_sentinel_id=50, num_sentinels=3, eos_id=1, start_id=0),
}
REFUSED = {
    "gpt-ttm": {"ep": "model has no mixture"},
    "gpt-moe": {"tp2": "parallel.sequence"},
    "mpobert": {"ep": "model has no mixture"},
    "t5-moe": {
        "tp2": "parallel.sequence",
        "pp": "no longer pass an encoder's result on",
        "cp": "sees the whole source",
    },
}
"""Degrees of a layout that a network refuses, with a part of the reason."""


def refusals(name: str, layout: Layout) -> list[str]:
    """Return what `problems()` says of a cell."""
    objective = OBJECTIVES[name]
    # Source and targets of T5 have other lengths than the text that they are made of.
    length = next(
        n
        for n in range(LENGTH, 99)
        if all(
            part % 4 == 0 for part in (objective.lengths(n).inputs, objective.lengths(n).targets)
        )
    )
    source = SourceConfig(path="data")
    data = DataConfig(sources=(source,), sequence_length=length, objective=objective)
    asked = Asked(NETWORKS[name], layout.parallel, data, GLOBAL, MICRO, layout.ranks)
    model_refuses = layout.parallel.expert > 1 and NETWORKS[name].moe is None
    found = expert_problems(layout.engine, layout.parallel.expert, None) if model_refuses else []
    return found + megatron_problems(asked)


def reason_of(name: str, layout: str) -> str | None:
    """Return a part of the reason for which a cell is refused; None where it runs."""
    degrees = layout.split("+")
    for degree, reason in REFUSED[name].items():
        without_sp = degree != "tp2" or not {"sp"} & set(degrees)
        if any(part.startswith(degree) for part in degrees) and without_sp:
            return reason
    return None
