"""Families of weight matrices in a plan report: size, contraction plan, FLOPs (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from mpotrain.config import RunConfig
from mpotrain.models.sites import Site
from mpotrain.nn.config import MPOSite, TTMSite, site_plan
from mpotrain.nn.moe.config import AsymmetricExpertSite, MPOExpertSite, expert_site_plan
from mpotrain.report.share import RankShare, rank_share
from mpotrain.tensor.cost import dense_cost
from mpotrain.tensor.device import PROFILES
from mpotrain.tensor.expert_plan import ExpertPlan
from mpotrain.tensor.experts import auxiliary_shapes, num_expert_parameters
from mpotrain.tensor.plan import ContractionPlan
from mpotrain.tensor.spec import MPOSpec


@dataclass(frozen=True)
class SiteReport:
    """One family of weight matrices.

    Attributes:
        family: name of the family.
        key: where the run file describes it, below `model`.
        copies: number of matrices; a mixture of experts counts as one, and so does a matrix that
            layers share.
        calls: how often a forward pass uses each of them.
        num_shared: central tensors that the copies share; 0 where each has its own.
        num_experts: experts of each mixture, 0 outside of mixtures.
        shape: (in, out) of each.
        padded: shape of the operator where it is larger than the matrix, else None.
        modes: one (i, j) for each core; empty when dense.
        bonds: inner bond dimensions.
        parameters: of all copies and experts, biases not counted.
        dense_parameters: of all copies and experts if they were dense.
        plan: the contraction plan in words.
        time_ratio: predicted forward + backward time over that of one dense layer which computes
            the same rows.
        kept_bytes: kept by the plan for the backward pass beside inputs and cores, all copies.
        transient_bytes: peak of short-lived bytes while one copy is computed.
        flops_per_step: executed FLOPs, forward and backward, all copies and ranks.
    """

    family: str
    key: str
    copies: int
    calls: int
    num_shared: int
    num_experts: int
    shape: tuple[int, int]
    padded: tuple[int, int] | None
    modes: list[tuple[int, int]]
    bonds: list[int]
    parameters: int
    dense_parameters: int
    plan: str
    time_ratio: float
    kept_bytes: int
    transient_bytes: int
    flops_per_step: float


@dataclass(frozen=True)
class _Execution:
    """How one micro-batch meets one matrix: by which plan, for how much."""

    words: str
    time_ratio: float
    forward_flops: int
    backward_flops: int
    kept_bytes: int = 0
    transient_bytes: int = 0


def families(run: RunConfig) -> list[list[Site]]:
    """Return the sites of the model, those of a family together."""
    groups: dict[str, list[Site]] = {}
    for site in run.model.all_sites():
        groups.setdefault(site.family, []).append(site)
    return list(groups.values())


def site_reports(run: RunConfig, device: str, accumulation: int = 1) -> list[SiteReport]:
    """Return what every family of weight matrices costs.

    Args:
        run: a validated run.
        device: name of a device profile.
        accumulation: micro-batches of a step on each data-parallel rank.
    """
    share = rank_share(run)
    return [_site_report(run, group, share, device, accumulation) for group in families(run)]


def render_operations(run: RunConfig, device: str) -> str:
    """Return every contraction of every family of sites, operation by operation."""
    tables, share = [], rank_share(run)
    for group in families(run):
        plan = _plan(run, group[0], share, device)
        if plan is not None:
            tables.append(f"\n{group[0].family}\n{plan.describe()}")
    return "\n".join(tables) or "\nevery site is dense"


def _site_report(
    run: RunConfig, group: list[Site], share: RankShare, device: str, accumulation: int
) -> SiteReport:
    site, copies = group[0], len(group)
    dense = site.in_features * site.out_features * max(site.num_experts, 1)
    execution = _execution(run, site, share, device)
    if share.caches(site):
        execution = _once_per_step(execution, share.spec(site), share.rows(site), accumulation)
    recomputed = run.model.activation_checkpointing and site.family != "embedding"
    flops = (2 if recomputed else 1) * execution.forward_flops + execution.backward_flops
    uses = copies * site.calls
    calls = uses * (run.train.global_batch_size // run.train.micro_batch_size) * share.ranks(site)
    spec = site.spec
    return SiteReport(
        family=site.family,
        key=site.key,
        copies=copies,
        calls=site.calls,
        num_shared=len({each.bank for each in group} - {None}),
        num_experts=site.num_experts,
        shape=(site.in_features, site.out_features),
        padded=(spec.padded_in, spec.padded_out) if spec is not None and spec.is_padded else None,
        modes=[] if spec is None else list(zip(spec.in_modes, spec.out_modes, strict=True)),
        bonds=[] if spec is None else list(spec.bonds),
        parameters=copies * _own_parameters(site) + _banked_parameters(group),
        dense_parameters=copies * dense,
        plan=execution.words,
        time_ratio=execution.time_ratio,
        # Recomputed blocks keep something one at a time only.
        kept_bytes=(1 if recomputed else uses) * execution.kept_bytes,
        transient_bytes=execution.transient_bytes,
        flops_per_step=float(flops) * calls,
    )


def _own_parameters(site: Site) -> int:
    if site.spec is None:
        return site.in_features * site.out_features * max(site.num_experts, 1)
    if site.num_experts:
        return num_expert_parameters(site.spec, site.num_experts)
    if site.bank is not None:
        return sum(prod(shape) for shape in auxiliary_shapes(site.spec))
    return site.spec.num_parameters


def _banked_parameters(group: list[Site]) -> int:
    """Return the parameters of the central tensors that the sites of a family share."""
    spec, banks = group[0].spec, {site.bank for site in group} - {None}
    return 0 if spec is None else len(banks) * prod(spec.core_shapes[spec.central_index])


def _execution(run: RunConfig, site: Site, share: RankShare, device: str) -> _Execution:
    plan = _plan(run, site, share, device)
    if plan is not None:
        words = _plan_words(plan) if isinstance(plan, ContractionPlan) else _expert_words(plan)
        return _Execution(
            words,
            plan.ratio,
            plan.forward_flops,
            plan.backward_flops,
            plan.saved_bytes,
            plan.transient_bytes,
        )
    rows = share.rows(site) * site.top_k
    shape = share.shape(site)
    forward = 2 * shape[0] * shape[1] * rows
    ratio = _grouped_ratio(run, site, shape, rows, device) if site.num_experts else 1.0
    words = "grouped product" if site.num_experts else "dense"
    return _Execution(words, ratio, forward, 2 * forward)


def _once_per_step(
    execution: _Execution, spec: MPOSpec | None, rows: int, accumulation: int
) -> _Execution:
    """Return what each micro-batch does where a matrix is rebuilt once for all of them."""
    assert spec is not None
    dense = 2 * spec.in_features * spec.out_features * rows
    return _Execution(
        "W rebuilt once per step",
        1.0 + (execution.time_ratio - 1.0) / accumulation,
        dense + (execution.forward_flops - dense) // accumulation,
        2 * dense + (execution.backward_flops - 2 * dense) // accumulation,
        0,  # W and its gradient belong to the training state
        execution.transient_bytes,
    )


def _plan(
    run: RunConfig, site: Site, share: RankShare, device: str
) -> ContractionPlan | ExpertPlan | None:
    """Return the plan of a site as its layer will ask for it; None when dense."""
    choice, dtype, profile = site.choice, run.engine.dtype, PROFILES[device]
    spec, rows = share.spec(site), share.rows(site)
    if spec is None:
        return None
    if isinstance(choice, MPOExpertSite | AsymmetricExpertSite):
        experts = local_experts(run, site.num_experts)
        return expert_site_plan(choice, spec, experts, rows * site.top_k, dtype, profile)
    assert isinstance(choice, MPOSite | TTMSite)
    if share.caches(site):
        choice = replace(choice, plan="materialise", keep_weight=True)
    # Of a tied embedding the output layer is the one that costs: the transposed operator.
    spec = spec.transposed() if site.family == "embedding" else spec
    return site_plan(choice, spec, rows, dtype, profile)


def local_experts(run: RunConfig, num_experts: int) -> int:
    """Return the experts of a mixture that one rank holds; all where they cannot be divided."""
    ranks = run.parallel.expert
    return num_experts if num_experts % ranks else num_experts // ranks


def _grouped_ratio(
    run: RunConfig, site: Site, shape: tuple[int, int], rows: int, device: str
) -> float:
    """Return the predicted time of as many small products as there are experts over one product."""
    experts = local_experts(run, site.num_experts)
    dtype, profile = run.engine.dtype, PROFILES[device]
    one = dense_cost(*shape, -(-rows // experts), dtype, profile).seconds
    return experts * one / dense_cost(*shape, rows, dtype, profile).seconds


def _plan_words(plan: ContractionPlan) -> str:
    if plan.kind == "materialise":
        return "materialise, W kept" if plan.keep_weight else "materialise, W rebuilt in backward"
    sizes = "+".join(str(last - first + 1) for first, last in plan.groups)
    return f"{plan.kind} {sizes} {plan.direction}"


def _expert_words(plan: ExpertPlan) -> str:
    if plan.kind == "factored":
        return "factored" + (", central product kept" if plan.keep_state else "")
    return f"grouped, {plan.chunk} of {plan.num_experts} rebuilt at a time"
