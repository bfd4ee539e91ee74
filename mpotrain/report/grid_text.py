"""The grid of ranks and its stages as text for a terminal (no torch)."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import wrap

from mpotrain.parallel.grid import DENSE_AXES, EXPERT_AXES
from mpotrain.report.grid import CutReport, GridReport, StageReport
from mpotrain.report.units import human_bytes

MOST_RANKS = 64
"""Larger worlds are not listed rank by rank."""
TRAFFIC_NAMES = {
    "tensor": "activations, tensor-parallel",
    "partial": "partial gradients",
    "context": "keys and values",
    "pipeline": "between stages",
    "tokens": "tokens to experts",
    "gradients": "gradients",
    "weights": "weights",
    "copies": "copies on other stages",
}
"""What each dimension's traffic is called."""


def grid_lines(report: GridReport) -> list[str]:
    """Return the lines on ranks, cut matrices and stages."""
    grid = report.grid
    sizes = " x ".join(f"{getattr(grid, axis)} {axis}" for axis in DENSE_AXES)
    lines = [f"ranks             {grid.world_size} = {sizes}"]
    if report.has_experts:
        experts = " x ".join(f"{getattr(grid, axis)} {axis}" for axis in EXPERT_AXES)
        lines.append(f"  experts         {grid.world_size} = {experts}")
    lines += [f"  {axis:<15} rank 0 with {_ranks(group)}" for axis, group in report.groups.items()]
    lines += [*_places(report), *_cut_lines(report.cuts)]
    return [*lines, "", *_stage_lines(report.stages)]


def traffic_lines(report: GridReport) -> list[str]:
    """Return the lines on what the busiest rank sends."""
    traffic = report.stages[report.busiest].traffic
    lines = [
        f"traffic per step  {human_bytes(traffic.total)} sent by each rank of stage "
        f"{report.busiest}, the busiest"
    ]
    lines += [
        f"  {TRAFFIC_NAMES[key]:<28} {human_bytes(nbytes):>9}"
        for key, nbytes in asdict(traffic).items()
        if nbytes
    ]
    return lines


def _ranks(group: list[int]) -> str:
    shown = group if len(group) <= 16 else [*group[:3], *group[-1:]]
    words = [str(rank) for rank in shown]
    if len(shown) < len(group):
        words.insert(3, "...")
    return " ".join(words)


def _places(report: GridReport) -> list[str]:
    axes = report.axes()
    if not axes or report.grid.world_size > MOST_RANKS:
        return []
    lines = [f"  {'rank':>6}  " + "  ".join(axes)]
    for rank in range(report.grid.world_size):
        places = report.coordinates(rank)
        lines.append(f"  {rank:>6}  " + "  ".join(f"{places[axis]:>{len(axis)}}" for axis in axes))
    return lines


def _cut_lines(cuts: list[CutReport]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for cut in cuts:
        what = "features" if cut.core is None else f"mode {cut.mode} of core {cut.core + 1}"
        order = "in blocks" if cut.period == cut.features else f"in turns of {cut.period}"
        words = f"{what} over {cut.ranks} ranks ({cut.side} features {order})"
        alike.setdefault(words, []).append(cut.family)
    return [
        line
        for words, families in alike.items()
        for line in wrap(
            f"cut {words}: {', '.join(families)}",
            100,
            initial_indent="  ",
            subsequent_indent="      ",
        )
    ]


def _stage_lines(stages: list[StageReport]) -> list[str]:
    lines = [
        f"{'stage':>5}  {'layers':<16} {'parameters':>13} {'passes':>6} {'state':>9} "
        f"{'activations':>11} {'memory':>9} {'sent':>9}"
    ]
    for stage in stages:
        layers = " ".join(f"{first}-{last}" for first, last in stage.chunks) or "all"
        lines.append(
            f"{stage.stage:>5}  {layers:<16} {stage.parameters:>13,} {stage.passes:>6} "
            f"{human_bytes(stage.state.total):>9} {human_bytes(stage.activations.total):>11} "
            f"{human_bytes(stage.memory):>9} {human_bytes(stage.traffic.total):>9}"
        )
    return lines
