"""What spreading experts over ranks costs and saves, for every degree that is possible (no torch).

A rank either holds all experts and reduces the gradients of all of them, or it holds some, and
tokens travel to the others. Only what belongs to single experts moves: a shared central tensor is
on every rank and is reduced like any other weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpotrain.engine.config import EngineConfig, expert_problems
from mpotrain.engine.memory import ExpertSizes, state_memory, step_traffic


@dataclass(frozen=True)
class TokenFlow:
    """Tokens that one rank sends through the mixtures of a model in one micro-batch.

    Attributes:
        num_tokens: tokens of the micro-batch.
        top_k: experts of each token.
        hidden_size: width of a token.
        width: bytes of one of its elements.
        num_mixtures: mixtures of the model.
        recomputed: whether blocks are computed once more in the backward pass.
    """

    num_tokens: int
    top_k: int
    hidden_size: int
    width: int
    num_mixtures: int
    recomputed: bool

    def exchanged(self, ranks: int) -> int:
        """Return the bytes that leave a rank when experts are spread evenly over `ranks`.

        A token travels to its expert and back, its gradients take the same way: four exchanges,
        two more where the block is recomputed. Of even loads 1 / ranks stays at home.
        """
        exchanges = 6 if self.recomputed else 4
        rows = self.num_tokens * self.top_k * self.num_mixtures
        sent = exchanges * rows * self.hidden_size * self.width
        return sent - sent // ranks


@dataclass(frozen=True)
class ExpertLayout:
    """One way of spreading the experts.

    Attributes:
        ranks: value of `parallel.expert`.
        local_experts: experts of each mixture that a rank holds.
        tokens: bytes of tokens that a rank sends in a step.
        gradients: bytes that a rank sends in a step to reduce gradients of experts.
        weights: bytes that a rank sends in a step to gather updated weights of experts.
        state: bytes of training state on a rank, all parameters.
    """

    ranks: int
    local_experts: int
    tokens: int
    gradients: int
    weights: int
    state: int

    @property
    def total(self) -> int:
        """Bytes that a rank sends in a step because of the experts."""
        return self.tokens + self.gradients + self.weights


def expert_layouts(
    engine: EngineConfig,
    sizes: Sequence[tuple[int, int]],
    world_size: int,
    accumulation: int,
    flow: TokenFlow,
) -> list[ExpertLayout]:
    """Return degree 1, and every other that divides experts and world and that the engine accepts.

    Args:
        engine: the back end.
        sizes: number of elements and of experts (0 outside of them) of every parameter.
        world_size: data-parallel ranks.
        accumulation: micro-batches that a rank accumulates in a step.
        flow: tokens of a micro-batch.
    """
    num_experts = max(experts for _, experts in sizes)
    elements = sum(size for size, experts in sizes if experts)
    everything = [size for size, _ in sizes]
    shared = [size for size, experts in sizes if not experts]
    other = step_traffic(engine, shared, world_size, accumulation)
    layouts = []
    for ranks in range(1, min(world_size, num_experts) + 1):
        if ranks > 1 and (world_size % ranks or expert_problems(engine, ranks, num_experts)):
            continue
        spread = ExpertSizes(elements, ranks, flow.exchanged(ranks))
        traffic = step_traffic(engine, everything, world_size, accumulation, spread)
        layouts.append(
            ExpertLayout(
                ranks=ranks,
                local_experts=num_experts // ranks,
                tokens=traffic.tokens,
                gradients=traffic.gradients - other.gradients,
                weights=traffic.weights - other.weights,
                state=state_memory(engine, everything, world_size, spread).total,
            )
        )
    return layouts


def least_traffic(layouts: Sequence[ExpertLayout]) -> ExpertLayout:
    """Return the layout that sends least; of equal ones the least spread."""
    return min(layouts, key=lambda layout: (layout.total, layout.ranks))
