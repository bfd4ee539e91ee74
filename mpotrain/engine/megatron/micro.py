"""What accompanies one micro-batch on its way through a chunk of the network.

Megatron-core's blocks hand `attention_bias` through to every layer and every attention unopened;
this engine's own layers find a `Micro` there. It says what attention may see, and it takes what
mixtures of experts tell: nothing of a micro-batch is kept in a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


@dataclass
class Tally:
    """What the mixtures of a chunk tell of one forward pass, by their logical names.

    Recomputation runs a layer a second time, when the tally is closed: it counts nothing then.

    Attributes:
        told: statistics of each mixture, see `mpotrain.nn.moe.mixture.MixtureOfExperts`: sums over
            the whole micro-batch, the same on all tensor- and context-parallel ranks.
        sums: what the network itself counts, as `LossOutput.statistics`, and under "loss_sum" the
            summed loss of the targets: sums over the positions of this context-parallel rank.
        is_open: whether the forward pass goes on.
    """

    told: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    is_open: bool = True

    def add(self, mixture: str, statistics: Mapping[str, Tensor]) -> None:
        """Take the statistics of a mixture."""
        if self.is_open:
            self.told[mixture] = statistics


@dataclass
class Micro:
    """One micro-batch in one chunk.

    Attributes:
        slot: its number among this rank's micro-batches of the step.
        is_last: whether it is the last of them, whose backward pass ends the step.
        loss_scale: what one nat of the summed objective weighs in the gradient: 1 / (targets of
            the global batch).
        auxiliary_scale: what the auxiliary loss of a mixture (a mean over the micro-batch) weighs:
            (targets of the micro-batch) / (targets of the global batch).
        tally: takes what mixtures tell.
        seen: what a query sees, bool (B, 1, T, S) over whole sequences; None = everything, or all
            up to itself in causal attention.
        terms: added to the scores of self-attention (1 or B, local heads, T, S); None = nothing.
        memory_terms: likewise for attention to the encoder of a sequence-to-sequence network.
    """

    slot: int
    is_last: bool
    loss_scale: float
    auxiliary_scale: float
    tally: Tally
    seen: Tensor | None = None
    terms: Tensor | None = None
    memory_terms: Tensor | None = None


CPU = torch.device("cpu")


# Every chunk and every layer asks for the same few tensors; a copy to a GPU in each would make it
# wait. Evaluation may be the first to ask, so they are made as tensors that autograd may keep.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def positions_of_rank(length: int, ranks: int, rank: int, device: torch.device = CPU) -> Tensor:
    """Return the positions of a sequence that a context-parallel rank holds, int64.

    The sequence is cut into 2p chunks, of which rank r holds the r-th and the r-th from the end,
    so that under a causal mask all ranks do the same work (Megatron-core's zigzag).

    Args:
        length: positions of the whole sequence; a multiple of 2p where p > 1.
        ranks: p.
        rank: r.
        device: of the result, which nobody may change.
    """
    if ranks == 1:
        return torch.arange(length, device=device)
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]]).to(device)
