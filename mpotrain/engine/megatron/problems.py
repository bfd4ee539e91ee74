"""Which mixes of network, degrees and world the Megatron engine cannot run, and why (no torch).

Megatron-core checks few of these itself: some end in a failed assertion deep inside a layer, some
in a group of ranks that waits for ever, and some in training that is wrong without a word. Every
line names the nearest choice that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import gcd, lcm

from mpotrain.data.config import DataConfig
from mpotrain.engine.megatron.feature_cuts import feature_problems
from mpotrain.models.config import AnyModel
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.plan import ParallelConfig

LONGEST_SEARCH = 8192
"""How far from the length asked for a possible one is looked for, in tokens."""


@dataclass(frozen=True)
class Layout:
    """What the checks read of a run; each section is free of problems of its own.

    Attributes:
        model: the network.
        parallel: the degrees.
        data: how long samples are.
        global_batch_size: sequences of a step.
        micro_batch_size: sequences of a forward pass.
        world_size: number of processes; None = not known yet.
    """

    model: AnyModel
    parallel: ParallelConfig
    data: DataConfig
    global_batch_size: int
    micro_batch_size: int
    world_size: int | None = None


def megatron_problems(layout: Layout) -> list[str]:
    """Return everything that makes a run impossible under this engine, one line each.

    Args:
        layout: of the run.
    """
    checks: tuple[Callable[[Layout], list[str]], ...] = (
        _network_problems,
        _pipeline_problems,
        _length_problems,
        _sequence_problems,
        _expert_problems,
        _capacity_problems,
        _world_problems,
        _schedule_problems,
    )
    return [line for check in checks for line in check(layout)]


def _network_problems(layout: Layout) -> list[str]:
    model, parallel, found = layout.model, layout.parallel, []
    if model.sites.embedding.kind != "dense":
        found.append(
            f'model.sites.embedding: "{model.sites.embedding.kind}", but the Megatron engine '
            "shares out the rows of the token embedding, which a tensorized one does not have; "
            'use kind = "dense", or engine.kind="deepspeed"'
        )
    if isinstance(model, T5Config):
        if parallel.pipeline > 1:
            found.append(
                f"parallel.pipeline: {parallel.pipeline}, but the schedules of megatron-core 0.16 "
                "no longer pass an encoder's result on to the stages of a decoder; use "
                "parallel.pipeline=1"
            )
        if parallel.context > 1:
            found.append(
                f"parallel.context: {parallel.context}, but the decoder of T5 sees the whole "
                "source from every position, and source and targets are cut differently; use "
                "parallel.context=1"
            )
    # What is wrong with the degree itself is said below, not once for every matrix.
    expert_tensor = parallel.expert_tensor if _fits_expert_tensor(parallel) else 1
    return found + feature_problems(model, parallel.tensor, expert_tensor)


def _pipeline_problems(layout: Layout) -> list[str]:
    model, stages, chunks = layout.model, layout.parallel.pipeline, layout.parallel.virtual_pipeline
    if isinstance(model, T5Config):
        if chunks == 1:
            return []
        return [
            f"parallel.virtual_pipeline: {chunks} chunks on each stage, but T5 is not cut into "
            "stages; use parallel.virtual_pipeline=1"
        ]
    depth = model.num_layers
    divisors = _divisors(depth)
    possible = [n for n in divisors if (depth // n) % chunks == 0 and (chunks == 1 or n > 1)]
    alone = "" if chunks == 1 else " and parallel.virtual_pipeline=1"
    instead = f"{_near(possible or divisors, stages)}{'' if possible else alone}"
    if depth % stages:
        return [
            f"parallel.pipeline: {stages} stages do not divide the {depth} layers "
            f"(model.num_layers); use parallel.pipeline={instead}"
        ]
    if chunks > 1 and stages == 1:
        other = f", or parallel.pipeline={instead}" if possible else ""
        return [
            f"parallel.virtual_pipeline: {chunks} chunks on each stage, but there is one stage "
            "and nothing to interleave; use parallel.virtual_pipeline=1" + other
        ]
    if depth % (stages * chunks):
        return [
            f"parallel.virtual_pipeline: {chunks} chunks on each of {stages} stages do not divide "
            f"the {depth} layers (model.num_layers); use "
            f"parallel.virtual_pipeline={_near(_divisors(depth // stages), chunks)}"
        ]
    return []


def _length_problems(layout: Layout) -> list[str]:
    parallel, data, model = layout.parallel, layout.data, layout.model
    tensor = parallel.tensor if parallel.sequence else 1
    context = 1 if isinstance(model, T5Config) else parallel.context
    unit = lcm(tensor * context, 2 * context if context > 1 else 1)

    def rest(length: int) -> list[str]:
        lengths = data.objective.lengths(length)
        counts = {"inputs": lengths.inputs}
        if isinstance(model, T5Config):
            counts["targets"] = lengths.targets
        return [f"{count} {name}" for name, count in counts.items() if count % unit]

    wrong = rest(data.sequence_length)
    if not wrong:
        return []
    longest = model.longest_sequence or data.sequence_length + LONGEST_SEARCH

    def fits(length: int) -> bool:
        return not data.objective.problems("data.objective", length) and not rest(length)

    choices = _near_where(data.sequence_length, longest, fits)
    degrees = [f"parallel.tensor={tensor} with parallel.sequence"] if tensor > 1 else []
    degrees += [f"parallel.context={context} (two parts for each rank)"] if context > 1 else []
    lower = "parallel.sequence=false" if tensor > 1 else "parallel.context=1"
    return [
        f"data.sequence_length: {data.sequence_length} makes {' and '.join(wrong)}, no multiple of "
        f"{unit}, which {' and '.join(degrees)} need; use "
        + (f"data.sequence_length={choices}, or " if choices else "")
        + lower
    ]


def _sequence_problems(layout: Layout) -> list[str]:
    parallel = layout.parallel
    if parallel.sequence and parallel.tensor == 1:
        return [
            "parallel.sequence: true, but parallel.tensor is 1 and there are no ranks to share the "
            "positions; set parallel.sequence=false, or raise parallel.tensor"
        ]
    if layout.model.moe is not None and parallel.tensor > 1 and not parallel.sequence:
        return [
            f"parallel.sequence: false, but with parallel.tensor={parallel.tensor} every rank "
            "would send every token to the experts once more; set parallel.sequence=true, or "
            "parallel.tensor=1"
        ]
    return []


def _fits_expert_tensor(parallel: ParallelConfig) -> bool:
    return parallel.expert_tensor in (1, parallel.tensor)


def _expert_problems(layout: Layout) -> list[str]:
    parallel, moe, found = layout.parallel, layout.model.moe, []
    if moe is None:
        return [
            f"parallel.{key}: {getattr(parallel, key)}, but the model has no mixture of experts "
            f"(model.moe); use parallel.{key}=1"
            for key in ("expert", "expert_tensor")
            if getattr(parallel, key) > 1
        ]
    if not _fits_expert_tensor(parallel):
        either = "1" if parallel.tensor == 1 else f"1 or {parallel.tensor}"
        found.append(
            f"parallel.expert_tensor: {parallel.expert_tensor}, but the ranks that share an expert "
            f"are those that share everything else (parallel.tensor={parallel.tensor}), or none "
            f"share one; use parallel.expert_tensor={either}"
        )
    if moe.num_experts % parallel.expert:
        found.append(
            f"parallel.expert: {parallel.expert} ranks do not divide the {moe.num_experts} experts "
            f"(model.moe.num_experts); use parallel.expert="
            f"{_near(_divisors(moe.num_experts), parallel.expert)}"
        )
    return found


def _capacity_problems(layout: Layout) -> list[str]:
    parallel, moe = layout.parallel, layout.model.moe
    if moe is None:
        return []
    splits = ["parallel.sequence"] if parallel.sequence and parallel.tensor > 1 else []
    splits += ["parallel.context"] if parallel.context > 1 else []
    if not splits:
        return []
    whole = " and ".join(
        "parallel.tensor=1 (parallel.sequence=false)" if key == "parallel.sequence" else f"{key}=1"
        for key in splits
    )
    return [
        f"model.moe.router.{key}: which tokens are dropped follows from their order in the "
        f"micro-batch, and under {' and '.join(splits)} no rank sees all of them; leave it out, "
        f"or use {whole}"
        for key in ("capacity_factor", "eval_capacity_factor")
        if getattr(moe.router, key) is not None
    ]


def _world_problems(layout: Layout) -> list[str]:
    parallel, world = layout.parallel, layout.world_size
    if world is None:
        return []
    dense = parallel.model_ranks
    experts = parallel.expert * parallel.expert_tensor * parallel.pipeline
    processes = _near_multiples(lcm(dense, experts), world)
    if parallel.data is not None and dense * parallel.data % experts == 0:
        processes = str(dense * parallel.data)
    if world % dense:
        return [
            f"parallel.tensor: tensor {parallel.tensor} x context {parallel.context} x pipeline "
            f"{parallel.pipeline} = {dense} ranks compute a micro-batch, but they do not divide "
            f"the world of {world}; start {processes} processes"
        ]
    if world % experts == 0 or layout.model.moe is None:
        return []
    beside = parallel.expert_tensor * parallel.pipeline
    common = gcd(layout.model.moe.num_experts, world // beside) if world % beside == 0 else 1
    fewer = f", or use parallel.expert={_near(_divisors(common), parallel.expert)}"
    return [
        f"parallel.expert: expert {parallel.expert} x expert_tensor {parallel.expert_tensor} x "
        f"pipeline {parallel.pipeline} = {experts} ranks hold every expert once, but they do not "
        f"divide the world of {world}; start {processes} processes"
        + (fewer if world % beside == 0 else "")
    ]


def _schedule_problems(layout: Layout) -> list[str]:
    """Return what the interleaved schedule refuses: micro-batches go round in groups of stages."""
    parallel, world = layout.parallel, layout.world_size
    stages = parallel.pipeline
    if world is None or parallel.virtual_pipeline == 1 or stages == 1:
        return []
    round_size = layout.micro_batch_size * parallel.data_ranks(world)
    count, left = divmod(layout.global_batch_size, round_size)
    if world % parallel.model_ranks or left or count % stages == 0:
        return []  # that the batch cannot be cut is said elsewhere
    sizes = _near_multiples(round_size * stages, layout.global_batch_size)
    return [
        f"train.global_batch_size: {layout.global_batch_size} sequences are {count} micro-batches "
        f"on each data-parallel rank, but with parallel.virtual_pipeline="
        f"{parallel.virtual_pipeline} they go round the {stages} stages in groups of {stages}; use "
        f"train.global_batch_size={sizes}, or parallel.virtual_pipeline=1"
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _near(possible: Iterable[int], wanted: int) -> str:
    """Return the nearest possible numbers, below and above the one that was wanted."""
    ordered = sorted(possible)
    below = [n for n in ordered if n < wanted][-1:]
    above = [n for n in ordered if n > wanted][:1]
    return " or ".join(map(str, below + above))


def _near_multiples(unit: int, wanted: int) -> str:
    below = wanted // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)


def _near_where(wanted: int, most: int, fits: Callable[[int], bool]) -> str:
    """Return the nearest numbers from 1 to `most` that fit."""
    least = max(1, wanted - LONGEST_SEARCH)
    below = next((n for n in range(wanted - 1, least - 1, -1) if fits(n)), None)
    above = next((n for n in range(wanted + 1, most + 1) if fits(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)
