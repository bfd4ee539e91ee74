"""A run on the Megatron engine in a plan report: ranks, stages, memory, traffic (no torch)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mpotrain.config import RunConfig
from mpotrain.engine.expert_traffic import ExpertLayout
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.feature_cuts import SIDES
from mpotrain.engine.megatron.memory import passes_under_way, stage_activations, stage_state
from mpotrain.engine.megatron.stages import Stage, Stages, Work
from mpotrain.engine.megatron.traffic import GridTraffic, stage_traffic
from mpotrain.engine.memory import StateMemory
from mpotrain.models.activations import ActivationMemory
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.grid import DENSE_AXES, EXPERT_AXES, RankGrid, rank_grid
from mpotrain.report.sites import SiteReport


@dataclass(frozen=True)
class StageReport:
    """What a rank of one stage holds and sends.

    Attributes:
        stage: its number.
        chunks: first and last layer of each of its chunks; empty where the network is not cut into
            stages.
        parameters: elements that a rank holds.
        passes: passes through a chunk whose activations are kept at the highest point.
        state: bytes of weights, masters, gradients and moments.
        activations: bytes kept by all passes under way.
        kept_by_plans: bytes that contraction plans keep for the backward pass.
        traffic: bytes a rank sends in a step.
    """

    stage: int
    chunks: list[tuple[int, int]]
    parameters: int
    passes: int
    state: StateMemory
    activations: ActivationMemory
    kept_by_plans: int
    traffic: GridTraffic

    @property
    def memory(self) -> int:
        """Bytes of a rank, but for short-lived ones."""
        return self.state.total + self.activations.total + self.kept_by_plans


@dataclass(frozen=True)
class CutReport:
    """How the features of one family of matrices are shared out.

    Attributes:
        family: name of the family.
        side: "out" or "in": which features.
        features: number of them.
        ranks: how many share them.
        period: of so many consecutive features each rank holds one part.
        core: the core that is cut, from 0; None of a dense matrix.
        mode: size of its mode; None of a dense matrix.
    """

    family: str
    side: str
    features: int
    ranks: int
    period: int
    core: int | None
    mode: int | None


@dataclass(frozen=True)
class GridReport:
    """The grid of ranks, and what each stage costs.

    Attributes:
        grid: sizes of all axes.
        has_experts: whether the network has a mixture; else the axes of experts mean nothing.
        groups: the ranks of rank 0's group on every axis of more than one rank.
        cuts: matrices of which a rank holds a part.
        stages: in the order of the pipeline.
        fullest: number of the stage whose ranks need most memory.
        busiest: number of the stage whose ranks send most.
    """

    grid: RankGrid
    has_experts: bool
    groups: dict[str, list[int]]
    cuts: list[CutReport]
    stages: list[StageReport]
    fullest: int
    busiest: int

    def axes(self) -> list[str]:
        """Return the axes that have more than one rank, dense ones first."""
        experts = EXPERT_AXES if self.has_experts else ()
        names = dict.fromkeys((*DENSE_AXES, *experts))
        return [name for name in names if getattr(self.grid, name) > 1]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the place of a rank on every axis."""
        return self.grid.coordinates(rank) | self.grid.coordinates(rank, EXPERT_AXES)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, totals and places of all ranks included."""
        data = asdict(self)
        for stage, plain in zip(self.stages, data["stages"], strict=True):
            for key in ("state", "activations", "traffic"):
                plain[key]["total"] = getattr(stage, key).total
            plain["memory"] = stage.memory
        data["ranks"] = [self.coordinates(rank) for rank in range(self.grid.world_size)]
        return data


def grid_report(
    run: RunConfig, world_size: int, accumulation: int, sites: list[SiteReport]
) -> GridReport | None:
    """Weigh a run of the Megatron engine; None under another, or where no grid exists.

    Args:
        run: a run without problems of its own.
        world_size: number of ranks.
        accumulation: micro-batches on each data-parallel rank.
        sites: reports of the families of matrices.
    """
    work = work_of(run, world_size, accumulation)
    if work is None:
        return None
    stages = Stages(work)
    reports = [_stage_report(stages, stage, sites) for stage in stages.stages]
    numbers = range(len(reports))
    grid = work.grid
    report = GridReport(
        grid=grid,
        has_experts=run.model.moe is not None,
        groups={},
        cuts=_cuts(stages),
        stages=reports,
        fullest=max(numbers, key=lambda n: reports[n].memory),
        busiest=max(numbers, key=lambda n: reports[n].traffic.total),
    )
    return replace(report, groups={axis: grid.group(0, axis) for axis in report.axes()})


def work_of(run: RunConfig, world_size: int, accumulation: int) -> Work | None:
    """Return the run as stages see it; None under another engine, or where no grid exists."""
    if not isinstance(run.engine, MegatronConfig) or rank_grid(run.parallel, world_size) is None:
        return None
    return Work(
        model=run.model,
        engine=run.engine,
        parallel=run.parallel,
        lengths=run.sample_lengths(),
        micro_batch_size=run.train.micro_batch_size,
        accumulation=accumulation,
        world_size=world_size,
    )


def expert_spreads(work: Work) -> list[ExpertLayout]:
    """Return what every possible value of `parallel.expert` costs a rank of the fullest stage.

    Args:
        work: a run with mixtures.
    """
    moe = work.model.moe
    assert moe is not None
    layouts = []
    for ranks in range(1, moe.num_experts + 1):
        parallel = replace(work.parallel, expert=ranks)
        if moe.num_experts % ranks or rank_grid(parallel, work.world_size) is None:
            continue
        stages = Stages(replace(work, parallel=parallel))
        layouts.append(max((_spread(stages, s) for s in stages.stages), key=lambda s: s.state))
    return layouts


def _spread(stages: Stages, stage: Stage) -> ExpertLayout:
    moe, ranks = stages.work.model.moe, stages.work.parallel.expert
    assert moe is not None
    experts = tuple(holding for holding in stage.holdings if holding.is_expert)
    traffic = stage_traffic(stages, replace(stage, holdings=experts))
    return ExpertLayout(
        ranks=ranks,
        local_experts=moe.num_experts // ranks,
        tokens=traffic.tokens,
        gradients=traffic.gradients,
        weights=traffic.weights,
        state=stage_state(stages, stage).total,
    )


def _stage_report(stages: Stages, stage: Stage, sites: list[SiteReport]) -> StageReport:
    work = stages.work
    return StageReport(
        stage=stage.number,
        chunks=[(layers[0], layers[-1]) for layers in stage.chunks if layers],
        parameters=stage.num_elements,
        passes=passes_under_way(work, stage.number),
        state=stage_state(stages, stage),
        activations=stage_activations(work, stage),
        kept_by_plans=_kept_by_plans(work, stage, sites),
        traffic=stage_traffic(stages, stage),
    )


def _kept_by_plans(work: Work, stage: Stage, sites: list[SiteReport]) -> int:
    """Return what plans keep: a stage has some of the layers, and several passes under way."""
    kept, model = sum(site.kept_bytes for site in sites), work.model
    if model.activation_checkpointing or isinstance(model, T5Config):
        return kept  # one block at a time, or all blocks on one stage
    passes = passes_under_way(work, stage.number)
    return kept * len(stage.layers) * passes // (model.num_layers * len(stage.chunks))


def _cuts(stages: Stages) -> list[CutReport]:
    found: dict[str, CutReport] = {}
    for site in stages.work.model.all_sites():
        part = stages.holder.part(site)
        if site.family in found or part.parts == 1:
            continue
        place, _ = SIDES[site.key]
        spec, core = site.spec, None if part.cut is None else part.cut.core
        modes = () if spec is None else spec.in_modes if part.side == "in" else spec.out_modes
        found[site.family] = CutReport(
            family=site.family,
            side=part.side,
            features=site.in_features if part.side == "in" else site.out_features,
            ranks=part.parts,
            period=getattr(stages.holder.periods, place),
            core=core,
            mode=None if core is None else modes[core],
        )
    return list(found.values())
