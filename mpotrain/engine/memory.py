"""What a rank holds and sends, predicted from sizes alone (no torch).

Bytes for each parameter follow from the engine: fp32 keeps the weight itself as master; 16-bit
weights have fp32 masters beside them; AdamW and LAMB keep two fp32 moments. ZeRO-1 splits masters
and moments over the ranks, ZeRO-2 gradients too, ZeRO-3 weights too (Rajbhandari et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpotrain.engine.config import DeepSpeedConfig, EngineConfig

FP32 = 4


@dataclass(frozen=True)
class StateMemory:
    """Bytes of training state on one rank's device.

    Attributes:
        weights: the weights the model computes with.
        masters: fp32 copies beside 16-bit or flat weights; 0 where the weight is the master.
        gradients: accumulated gradients.
        moments: both moments of the optimizer.
        buffers: for messages: gradients in flight, weights gathered ahead.
        on_host: part of the above that lives in host memory (offload).
        cache: matrices rebuilt once per step, and their summed gradients.
    """

    weights: int
    masters: int
    gradients: int
    moments: int
    buffers: int = 0
    on_host: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        state = self.weights + self.masters + self.gradients + self.moments
        return state + self.buffers + self.cache - self.on_host


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one rank sends in one optimizer step, by purpose.

    Ring algorithms: all-reduce sends 2 (w-1)/w of the buffer, reduce-scatter and all-gather
    (w-1)/w each, for a world of w ranks.

    Attributes:
        gradients: reduction of gradients.
        weights: gathering of updated (ZeRO-1, 2) or needed (ZeRO-3) weights.
        tokens: exchange of tokens between ranks that hold different experts.
    """

    gradients: int
    weights: int
    tokens: int = 0

    @property
    def total(self) -> int:
        """All bytes sent in a step."""
        return self.gradients + self.weights + self.tokens


@dataclass(frozen=True)
class ExpertSizes:
    """Parameters that are spread over expert-parallel ranks.

    Attributes:
        elements: all experts' elements together, over all mixtures.
        ranks: expert-parallel degree; 1 = every rank holds all of them.
        exchanged: bytes that leave a rank in one micro-batch with tokens on their way to experts
            and back, forward and backward.
    """

    elements: int = 0
    ranks: int = 1
    exchanged: int = 0


NO_EXPERTS = ExpertSizes()


def state_memory(
    engine: EngineConfig,
    sizes: Sequence[int],
    world_size: int,
    experts: ExpertSizes = NO_EXPERTS,
) -> StateMemory:
    """Return the training state of one rank.

    Args:
        engine: the back end.
        sizes: number of elements of every parameter, all experts included.
        world_size: data-parallel ranks.
        experts: how many of them are spread, and over how many ranks.
    """
    count = sum(sizes)
    elsewhere = experts.elements - experts.elements // experts.ranks
    if not isinstance(engine, DeepSpeedConfig):
        return StateMemory(FP32 * count, 0, FP32 * count, 2 * FP32 * count)
    stage = engine.zero_stage

    def share(nbytes: int, from_stage: int) -> int:
        return -(-nbytes // world_size) if stage >= from_stage else nbytes

    width = 2 if engine.dtype == "bf16" else FP32
    small = sum(size for size in sizes if size <= engine.persistence_threshold)
    # Masters and moments of experts are split over the fewer ranks that hold the same ones: what
    # a rank keeps of them is the same part of all experts as of everything else.
    held = count - elsewhere
    weights = width * small + share(width * (count - small), 3) if stage == 3 else width * held
    masters = 0 if stage == 0 else share(FP32 * count, 1)
    gradients = share(FP32 * count, 2) if stage >= 2 else FP32 * held
    moments = share(2 * FP32 * count, 1)
    on_host = masters + moments if engine.offload_optimizer else 0
    if engine.offload_parameters:
        on_host += weights
    buffers = _buffers(engine, sizes, width) if world_size > 1 else 0
    return StateMemory(weights, masters, gradients, moments, buffers, on_host)


def _buffers(engine: DeepSpeedConfig, sizes: Sequence[int], width: int) -> int:
    """Return the bytes of message buffers: buckets that are filled and buckets in flight."""
    count = sum(sizes)
    reduced = FP32 if engine.reduce_dtype == "fp32" else 2
    bucket = reduced * min(engine.reduce_bucket_elements, count)
    if engine.zero_stage == 0:
        return bucket
    if engine.zero_stage < 3:
        return bucket * (2 if engine.overlap_communication and engine.zero_stage == 2 else 1)
    split = sum(size for size in sizes if size > engine.persistence_threshold)
    ahead = min(engine.prefetch_elements, engine.max_live_elements, split)
    return bucket + width * ahead


def step_traffic(
    engine: EngineConfig,
    sizes: Sequence[int],
    world_size: int,
    accumulation: int,
    experts: ExpertSizes = NO_EXPERTS,
) -> StepTraffic:
    """Return what one rank sends in a step.

    Args:
        engine: the back end.
        sizes: number of elements of every parameter.
        world_size: data-parallel ranks.
        accumulation: micro-batches that a rank accumulates in a step.
        experts: parameters that are spread over expert-parallel ranks.
    """
    if world_size == 1 or not isinstance(engine, DeepSpeedConfig):
        return StepTraffic(0, 0)
    part = (world_size - 1) / world_size
    width = 2 if engine.dtype == "bf16" else FP32
    count, stage = sum(sizes), engine.zero_stage
    reduced = FP32 if engine.reduce_dtype == "fp32" else 2
    if stage == 0:
        return StepTraffic(round(2 * part * reduced * count), 0)
    # Stages 2 and 3 reduce every micro-batch, stage 1 once per step. Stages 1 and 2 all-reduce
    # whole buckets (use_multi_rank_bucket_allreduce), stage 3 reduce-scatters.
    reductions = accumulation if stage >= 2 else 1
    rings = 1 if stage == 3 else 2
    if stage < 3:
        # What is reduced and gathered over the whole world, and over ranks with the same experts.
        local = experts.elements // experts.ranks
        same = world_size // experts.ranks
        reach = part * (count - experts.elements) + (same - 1) / same * local
        return StepTraffic(
            round(rings * reach * reduced * reductions),
            round(reach * width),
            experts.exchanged * accumulation,
        )
    gradients = round(rings * part * reduced * count * reductions)
    split = sum(size for size in sizes if size > engine.persistence_threshold)
    # Forward of every micro-batch gathers what is split, and backward once more where too much is
    # live to be kept in between; the step gathers the rest.
    passes = 1 if split <= engine.max_live_elements else 2
    gathers = passes * accumulation * split + (count - split)
    return StepTraffic(gradients, round(part * width * gathers))
