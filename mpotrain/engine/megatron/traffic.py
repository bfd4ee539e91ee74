"""What a rank of each stage sends in a step, foretold for every parallel dimension (no torch).

Of a message of n bytes ring algorithms send 2 (r - 1)/r n for an all-reduce over r ranks, and
(r - 1)/r n for an all-gather or a reduce-scatter whose larger side it is. With T tokens of a
micro-batch on a context-parallel rank, activations of w bytes and sums of gradients in fp32:

- tensor: a column-parallel matrix (I x J) all-reduces dx, T I w bytes, a row-parallel one y, T J w
  bytes; under sequence parallelism each gathers one way and reduce-scatters the other way, and a
  column-parallel one gathers x once more for the gradient of its weights. Matrices that read the
  same x - queries, keys and values of one sequence - do so together. Layers that are computed again
  in the backward pass repeat what their forward pass sent. Around the layers: the embedding (T E
  w), the gradient of what scores are computed from, three numbers for each row of the loss; under
  sequence parallelism one gather of the residual stream at each end.
- partial: gradients of which each tensor-parallel rank has a part, all-reduced once per step; those
  that expert-tensor ranks have parts of, in every backward pass.
- context: keys and values of a layer are gathered, their gradients reduce-scattered.
- pipeline: the residual stream to the next chunk, its gradient to the one before.
- tokens: to the experts and back, forward and backward, at even loads; the factors of the rows
  travel along.
- gradients, weights: over the ranks that sum a gradient: reduce-scattered and gathered under the
  distributed optimizer, else all-reduced. Once per step.
- copies: gradients of tensors of which several stages hold a copy, all-reduced over the two ends,
  or over all stages, once per step.

Counts of tokens, statistics and norms are too small to count.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mpotrain.engine.megatron.feature_cuts import SIDES
from mpotrain.engine.megatron.holdings import Holding
from mpotrain.engine.megatron.stages import Stage, Stages, Work
from mpotrain.engine.memory import FP32
from mpotrain.models.activations import output_rows
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.network import ROUTER
from mpotrain.models.sites import Site
from mpotrain.models.t5_config import T5Config


@dataclass(frozen=True)
class GridTraffic:
    """Bytes that one rank sends in a step, by parallel dimension; see the module.

    Attributes:
        tensor: activations between tensor-parallel ranks.
        partial: parts of gradients, between tensor-parallel and expert-tensor ranks.
        context: keys and values.
        pipeline: hidden states and their gradients.
        tokens: exchange with ranks that hold other experts.
        gradients: sums of gradients over data-parallel ranks.
        weights: gathering of updated weights.
        copies: sums over stages that hold copies.
    """

    tensor: int = 0
    partial: int = 0
    context: int = 0
    pipeline: int = 0
    tokens: int = 0
    gradients: int = 0
    weights: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        """All bytes sent in a step."""
        return sum(asdict(self).values())


def gathered(ranks: int, nbytes: float) -> float:
    """Return what a rank sends in an all-gather or a reduce-scatter of `nbytes` over `ranks`."""
    return (ranks - 1) / ranks * nbytes


def stage_traffic(stages: Stages, stage: Stage) -> GridTraffic:
    """Return what one rank of a stage sends in a step.

    Args:
        stages: all stages of the run.
        stage: one of them.
    """
    work = stages.work
    gradients, weights = _data(work, stage)
    sites = list(stages.sites(stage))
    times = work.accumulation
    inner = sum(holding.size for holding in stage.holdings if holding.summed_inside)
    partial = sum(holding.size for holding in stage.holdings if holding.is_partial)
    return GridTraffic(
        tensor=round(times * (_matrices(work, sites) + _ends(work, stage))),
        partial=round(
            2 * gathered(work.parallel.tensor, FP32 * partial)
            + 2 * times * gathered(work.parallel.expert_tensor, FP32 * inner)
        ),
        context=round(times * _keys(work, stage)),
        pipeline=times * _hidden(work, stage),
        tokens=round(times * sum(_tokens(work, site) for site in sites if site.family == ROUTER)),
        gradients=round(gradients),
        weights=round(weights),
        copies=round(_copies(stages, stage)),
    )


def _matrices(work: Work, sites: list[Site]) -> float:
    """Return what the matrices of a stage send in a micro-batch."""
    return sum(_matrix(work, site) for site in sites if site.key in SIDES and not site.num_experts)


def _matrix(work: Work, site: Site) -> float:
    is_column = SIDES[site.key][1] == "out"
    if is_column and not _is_entry(site):
        return 0.0
    features = site.in_features if is_column else site.out_features
    message = work.tokens(work.lengths.of(site.stream)) * features * work.width
    once = gathered(work.parallel.tensor, message)
    again = work.model.activation_checkpointing and _is_repeated(work, site)
    if not work.splits_positions:
        return 2 * once * (2 if again and not is_column else 1)
    return once * ((3 if is_column else 2) + (1 if again else 0))


def _is_entry(site: Site) -> bool:
    """Return whether a column-parallel matrix is the first of those that read its input."""
    if site.key == "sites.key":
        # Of a sequence itself queries are made first; of what an encoder returned, none are.
        return site.family.startswith("cross_")
    return site.key != "sites.value"


def _is_repeated(work: Work, site: Site) -> bool:
    """Return whether a layer that is computed again gets as far as the sum behind this matrix.

    It stops with the last tensor that the backward pass needs. Behind the last matrix that is the
    mask of dropout, or the input of a norm.
    """
    if not site.family.endswith("c_proj"):
        return True
    model = work.model
    is_post = isinstance(model, EncoderConfig) and model.norm == "post"
    return is_post or model.dropout > 0


def _ends(work: Work, stage: Stage) -> float:
    """Return what embedding and loss send between tensor-parallel ranks in a micro-batch."""
    model, lengths, width = work.model, work.lengths, work.width
    tensor = work.parallel.tensor
    features = model.embedding_width if isinstance(model, EncoderConfig) else model.hidden_size
    sent = 0.0
    if stage.is_first:
        rows = lengths.inputs + (lengths.targets if isinstance(model, T5Config) else 0)
        tokens = work.tokens(rows)
        sent += 2 * gathered(tensor, tokens * features * width)
        if work.splits_positions:
            sent += gathered(tensor, tokens * model.hidden_size * width)
    if stage.is_last:
        rows = lengths.targets if isinstance(model, T5Config) else lengths.inputs
        if work.splits_positions:
            sent += gathered(tensor, work.tokens(rows) * model.hidden_size * width)
        scored = work.tokens(output_rows(model, lengths))
        sent += 2 * gathered(tensor, scored * (features * width + 3 * FP32))
    return sent


def _keys(work: Work, stage: Stage) -> float:
    """Return what attention over cut sequences sends in a micro-batch."""
    if work.parallel.context == 1:
        return 0.0
    model = work.model
    heads = model.hidden_size // work.parallel.tensor
    message = work.micro_batch_size * work.lengths.inputs * 2 * heads * work.width
    times = 3 if model.activation_checkpointing else 2
    return len(stage.layers) * times * gathered(work.parallel.context, message)


def _hidden(work: Work, stage: Stage) -> int:
    """Return what a stage sends to its neighbours in a micro-batch."""
    chunks = len(stage.chunks)
    forward = chunks - (1 if stage.is_last else 0)
    backward = chunks - (1 if stage.is_first else 0)
    tokens = work.tokens(work.lengths.inputs) // work.stream_parts
    message = tokens * work.model.hidden_size * work.width
    return (forward + backward) * message if stage.num_stages > 1 else 0


def _tokens(work: Work, router: Site) -> float:
    """Return what a mixture sends in a micro-batch."""
    model, parallel = work.model, work.parallel
    assert model.moe is not None
    own = work.tokens(work.lengths.of(router.stream)) // work.stream_parts
    again = model.activation_checkpointing
    row = model.hidden_size * work.width
    if work.engine.moe_dispatcher == "alltoall":
        # There with the factor of the row, and back. Between ranks that share an expert rows are
        # gathered, and their parts of the result reduce-scattered.
        passed = own * model.moe.router.top_k
        passed_on = gathered(parallel.expert, passed) + (parallel.expert_tensor - 1) * passed
        return (3 if again else 2) * passed_on * (2 * row + FP32)
    # All tokens to all ranks, with their factors and choices for all experts; results, and their
    # gradients, travel in the precision of the factors.
    others = parallel.expert * parallel.expert_tensor - 1
    experts = model.moe.num_experts
    there, back = row + FP32 * experts, FP32 * model.hidden_size
    forward = there + experts + back
    repeated = there + experts + (back if model.dropout > 0 else 0)
    return own * others * (forward + there + back + (repeated if again else 0))


def _data(work: Work, stage: Stage) -> tuple[float, float]:
    """Return what gradients and updated weights send between data-parallel ranks in a step."""
    grid, is_split = work.grid, work.engine.distributed_optimizer
    gradients = weights = 0.0
    for holding in stage.holdings:
        ranks = _summing_ranks(holding, grid.data * grid.context, grid.expert_data)
        gradients += (1 if is_split else 2) * gathered(ranks, FP32 * holding.size)
        weights += gathered(ranks, work.width * holding.size) if is_split else 0
    return gradients, weights


def _summing_ranks(holding: Holding, dense: int, expert: int) -> int:
    return expert if holding.is_expert else dense


def _copies(stages: Stages, stage: Stage) -> float:
    """Return what copies on several stages send in a step.

    What the first and the last stage alone have concerns these two. Everything else is summed over
    all stages; those without a copy take part with zeros.
    """
    last = stage.num_stages - 1
    ends = between = 0
    for name, holders in stages.held_by.items():
        if len(holders) < 2:
            continue
        if holders == [0, last]:
            ends += stages.sizes[name]
        else:
            between += stages.sizes[name]
    sent = 2 * gathered(stage.num_stages, FP32 * between)
    return sent + (2 * gathered(2, FP32 * ends) if stage.is_first or stage.is_last else 0)
