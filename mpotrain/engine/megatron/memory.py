"""Memory of a rank of each stage, foretold (no torch).

State. A rank holds w = 4 bytes for each of its weights (2 in bf16) and 4 for each gradient, a sum
in fp32. AdamW and LAMB keep two moments in fp32, and bf16 weights have masters in fp32: 8 and 4
bytes, of which the distributed optimizer leaves a rank 1/R: R = dp cp ranks sum the gradient of a
dense tensor, the expert-data ranks that of an expert's. Of the cores of an operator the one that is
cut is smaller; every stage has its own copy of what layers share, and the first and the last stage
of the embedding. What Megatron-core adds to fill its buckets evenly is not counted.

Activations (Korthikanti et al. 2022, arXiv 2205.05198, section 4). Of what a token keeps in a
block, heads and inner features are split over tp ranks; norms, the residual stream and what the
matrices in front of heads read only under sequence parallelism. Positions are split over cp ranks,
but each holds the keys and values of all. A stage keeps what belongs to the passes under way: of p
stages under 1F1B stage s has min(m, p - s) micro-batches, with v chunks on each stage
min(m v, 2 (p - s - 1) + (v - 1) p + 1) passes through a chunk (Narayanan et al. 2021, arXiv
2104.04473, section 2.2).
"""

from __future__ import annotations

from mpotrain.engine.megatron.stages import Stage, Stages, Work
from mpotrain.engine.memory import FP32, StateMemory
from mpotrain.models.activations import (
    ActivationMemory,
    BlockStack,
    TokenMemory,
    block_stacks,
    output_rows,
)
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.t5_config import T5Config

MOMENTS = 2


def stage_state(stages: Stages, stage: Stage) -> StateMemory:
    """Return the training state of one rank of a stage.

    Args:
        stages: all stages of the run.
        stage: one of them.
    """
    work = stages.work
    grid, is_split = work.grid, work.engine.distributed_optimizer
    held = {
        is_expert: sum(h.size for h in stage.holdings if h.is_expert == is_expert)
        for is_expert in (False, True)
    }
    ranks = {False: grid.data * grid.context, True: grid.expert_data}
    updated = sum(-(-size // (ranks[key] if is_split else 1)) for key, size in held.items())
    count = sum(held.values())
    copied = {holding.name: holding.size for holding in stage.holdings}
    messages = (
        sum(holding.size for holding in stage.holdings if holding.is_partial),
        sum(size for name, size in copied.items() if name in stage.copied)
        if stage.num_stages > 1
        else 0,
    )
    return StateMemory(
        weights=work.width * count,
        masters=0 if work.width == FP32 else FP32 * updated,
        gradients=FP32 * count,
        moments=MOMENTS * FP32 * updated,
        buffers=FP32 * max(messages),
        cache=cache_bytes(stages, stage),
    )


def cache_bytes(stages: Stages, stage: Stage) -> int:
    """Return the bytes of matrices rebuilt once per step, and of their gradients in fp32."""
    if not stages.work.engine.cache_weights:
        return 0
    sites = {
        site.name: site
        for site in stages.sites(stage)
        if site.spec is not None and not site.num_experts
    }
    elements = sum(
        site.in_features * site.out_features // stages.holder.part(site).parts
        for site in sites.values()
    )
    return elements * (stages.work.width + FP32)


def passes_under_way(work: Work, number: int) -> int:
    """Return how many passes through a chunk a stage keeps at the highest point.

    Args:
        work: the run.
        number: of the stage.
    """
    stages, chunks = work.parallel.pipeline, work.parallel.virtual_pipeline
    behind = stages - number - 1
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * stages
    return min(work.accumulation * chunks, warm_up + 1)


def stage_activations(work: Work, stage: Stage) -> ActivationMemory:
    """Return the activations of one rank of a stage at the highest point.

    Args:
        work: the run.
        stage: one of its stages.
    """
    stacks = block_stacks(work.model, work.lengths, work.micro_batch_size, work.width)
    passes, chunks = passes_under_way(work, stage.number), len(stage.chunks)
    kept, once = 0, 0
    for stack in stacks:
        layers = range(stack.depth) if isinstance(work.model, T5Config) else stage.layers
        more, most = _blocks(work, stack, layers)
        kept, once = kept + more, once + most
    blocks = -(-passes * kept // chunks) + once
    return ActivationMemory(blocks, _output(work) if stage.is_last else 0)


def _blocks(work: Work, stack: BlockStack, layers: range | list[int]) -> tuple[int, int]:
    """Return the bytes that each pass through some blocks keeps, and those that one of all does."""
    rows = stack.rows // work.parallel.context
    mixtures = set(stack.mixture_layers)
    tokens = [token_bytes(work, stack.mixture if n in mixtures else stack.plain) for n in layers]
    if work.model.activation_checkpointing:
        boundary = stack.boundary / work.stream_parts
        return round(rows * boundary * len(tokens)), round(rows * max(tokens, default=0))
    return round(rows * sum(tokens)), 0


def token_bytes(work: Work, kept: TokenMemory) -> float:
    """Return what a rank keeps in a block for each token of its context-parallel part.

    Args:
        work: the run.
        kept: what a token keeps where nothing is cut.
    """
    parallel = work.parallel
    inner = kept.inner + kept.keys * parallel.context + kept.rows * parallel.expert_tensor
    stream = (kept.stream + kept.inputs) / work.stream_parts
    return stream + inner / parallel.tensor + kept.whole


def _output(work: Work) -> int:
    """Return the bytes of the scores of the vocabulary while the loss is computed."""
    model = work.model
    features = model.embedding_width if isinstance(model, EncoderConfig) else model.hidden_size
    rows = work.tokens(output_rows(model, work.lengths))
    scores = -(-model.vocab_size // work.parallel.tensor) * (work.width + 2 * FP32)
    return rows * (scores + features * (work.width + FP32))
