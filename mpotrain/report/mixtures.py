"""Mixtures of experts in a plan report: active parameters, where experts should lie (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.config import RunConfig
from mpotrain.engine.expert_traffic import ExpertLayout, TokenFlow, expert_layouts, least_traffic
from mpotrain.engine.memory import NO_EXPERTS, ExpertSizes
from mpotrain.models.network import ROUTER
from mpotrain.report.grid import expert_spreads, work_of
from mpotrain.tensor.device import BYTES


@dataclass(frozen=True)
class MixtureReport:
    """The mixtures of a model.

    Attributes:
        num_mixtures: blocks with a mixture.
        num_experts: experts of each.
        top_k: experts that a token meets in each.
        active_parameters: parameters of the model that one token meets.
        expert_parameters: those of them all that belong to single experts.
        expert_ranks: `parallel.expert` of the run.
        layouts: possible ways of spreading the experts over the ranks.
        least_traffic: value of `parallel.expert` with which a rank sends least.
    """

    num_mixtures: int
    num_experts: int
    top_k: int
    active_parameters: int
    expert_parameters: int
    expert_ranks: int
    layouts: list[ExpertLayout]
    least_traffic: int


def mixture_report(run: RunConfig, world_size: int, accumulation: int) -> MixtureReport | None:
    """Weigh the mixtures of a run; None where it has none.

    Args:
        run: a validated run.
        world_size: number of ranks.
        accumulation: micro-batches that each rank accumulates.
    """
    moe = run.model.moe
    if moe is None:
        return None
    sizes = [(parameter.size, parameter.num_experts) for parameter in run.model.parameters()]
    work = work_of(run, world_size, accumulation)
    if work is None:
        layouts = expert_layouts(run.engine, sizes, world_size, accumulation, token_flow(run))
    else:
        layouts = expert_spreads(work)
    return MixtureReport(
        num_mixtures=len(run.model.mixtures()),
        num_experts=moe.num_experts,
        top_k=moe.router.top_k,
        active_parameters=run.model.active_parameters(),
        expert_parameters=sum(size for size, experts in sizes if experts),
        expert_ranks=run.parallel.expert,
        layouts=layouts,
        least_traffic=least_traffic(layouts).ranks,
    )


def token_flow(run: RunConfig) -> TokenFlow:
    """Return the tokens that travel in one micro-batch of a run with mixtures."""
    model, lengths = run.model, run.sample_lengths()
    rows = [lengths.of(site.stream) for site in model.all_sites() if site.family == ROUTER]
    return TokenFlow(
        # Encoder and decoder read sequences of different lengths: their mean.
        num_tokens=run.train.micro_batch_size * sum(rows) // max(len(rows), 1),
        top_k=1 if model.moe is None else model.moe.router.top_k,
        hidden_size=model.hidden_size,
        width=BYTES[run.engine.dtype],
        num_mixtures=len(model.mixtures()),
        recomputed=model.activation_checkpointing,
    )


def expert_sizes(run: RunConfig, world_size: int) -> ExpertSizes:
    """Return what the run spreads over its ranks; nothing where that is impossible."""
    moe, ranks = run.model.moe, run.parallel.expert
    if moe is None or ranks < 1 or world_size % ranks or moe.num_experts % ranks:
        return NO_EXPERTS
    elements = sum(parameter.size for parameter in run.model.parameters() if parameter.num_experts)
    return ExpertSizes(elements, ranks, token_flow(run).exchanged(ranks))
