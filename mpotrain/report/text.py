"""The plan report as text for a terminal (no torch)."""

from __future__ import annotations

from mpotrain.report.grid_text import grid_lines, traffic_lines
from mpotrain.report.mixtures import MixtureReport
from mpotrain.report.sites import SiteReport
from mpotrain.report.units import human_bytes
from mpotrain.report.weigh import PlanReport


def render(report: PlanReport) -> str:
    """Return the report as text for a terminal."""
    lines = [f"run {report.name}: {report.world_size} rank(s), costs for {report.device}", ""]
    compression = report.dense_num_parameters / report.num_parameters
    lines += [
        f"parameters        {report.num_parameters:>16,}",
        f"  if dense        {report.dense_num_parameters:>16,}   ({compression:.3f} x)",
    ]
    if report.body_parameters != report.num_parameters:
        apart = " and ".join(report.apart)
        body = f"{report.body_parameters:>16,}   (as papers count)"
        lines.append(f"  {'without ' + apart:<15} {body}")
    if report.mixtures is not None:
        active = report.mixtures.active_parameters
        lines.append(f"  active          {active:>16,}   (met by one token)")
    lines += [f"  {'role ' + k:<15} {v:>16,}" for k, v in sorted(report.by_role.items())]
    width = max(15, *map(len, report.by_part))
    lines += [
        f"  {part:<{width}} {size:>{max(31 - width, 10)},}" for part, size in report.by_part.items()
    ]
    lines += ["", *_site_lines(report.sites), ""]
    if report.grid is not None:
        lines += [*grid_lines(report.grid), ""]
    lines += [
        f"step              {report.tokens_per_step:,} tokens, "
        f"{report.accumulation} micro-batch(es) on each {_kind_of_rank(report)}",
        f"FLOPs             {report.model_flops_per_token:.4g} per token (dense-equivalent), "
        f"{report.executed_flops_per_step:.4g} per step executed by the plans",
    ]
    lines += [*_memory_lines(report), *_traffic_lines(report)]
    lines += [f"checkpoint        {human_bytes(report.checkpoint_bytes)}", ""]
    if report.mixtures is not None:
        lines += [*_mixture_lines(report.mixtures), ""]
    lines += [f"note: {note}" for note in report.notes]
    if report.problems:
        lines += ["problems:", *(f"  {problem}" for problem in report.problems)]
    else:
        lines.append("no problems found")
    return "\n".join(lines)


def _kind_of_rank(report: PlanReport) -> str:
    return "rank" if report.grid is None else "data-parallel rank"


def _memory_lines(report: PlanReport) -> list[str]:
    state, activations, grid = report.state, report.activations, report.grid
    whose = "" if grid is None else f" (of stage {grid.fullest}, the fullest)"
    lines = [
        f"memory per rank   {human_bytes(report.memory_per_rank)}{whose}",
        f"  weights         {human_bytes(state.weights)}",
        f"  masters         {human_bytes(state.masters)}",
        f"  gradients       {human_bytes(state.gradients)}",
        f"  moments         {human_bytes(state.moments)}",
        f"  buffers         {human_bytes(state.buffers)}",
    ]
    if grid is None:
        lines.append(f"  on host         {human_bytes(state.on_host)} (not counted above)")
    if state.cache:
        lines.append(f"  cached          {human_bytes(state.cache)} of matrices and gradients")
    return [
        *lines,
        f"  activations     {human_bytes(activations.blocks)} kept by the blocks, "
        f"{human_bytes(activations.output)} at the loss",
        f"  in plans        {human_bytes(report.kept_by_plans)} kept, "
        f"{human_bytes(report.transient)} short-lived",
    ]


def _traffic_lines(report: PlanReport) -> list[str]:
    if report.grid is not None:
        return traffic_lines(report.grid)
    return [
        f"traffic per step  {human_bytes(report.traffic.total)} sent by each rank "
        f"({_traffic_parts(report)})"
    ]


def _traffic_parts(report: PlanReport) -> str:
    traffic = report.traffic
    parts = [
        f"gradients {human_bytes(traffic.gradients)}",
        f"weights {human_bytes(traffic.weights)}",
    ]
    if report.mixtures is not None:
        parts.append(f"tokens {human_bytes(traffic.tokens)}")
    return ", ".join(parts)


def _mixture_lines(mixtures: MixtureReport) -> list[str]:
    lines = [
        f"mixtures          {mixtures.num_mixtures}, each of {mixtures.num_experts} experts, "
        f"top-{mixtures.top_k}; {mixtures.expert_parameters:,} parameters are of single experts"
    ]
    if len(mixtures.layouts) == 1:
        return lines
    lines.append(
        f"  {'experts over':<14} {'on a rank':>9}  {'tokens':>10} {'gradients':>10} "
        f"{'weights':>10} {'sent by a rank':>15} {'training state':>15}"
    )
    for layout in mixtures.layouts:
        spread = f"{layout.ranks} rank{'s' if layout.ranks > 1 else ''}"
        chosen = " *" if layout.ranks == mixtures.expert_ranks else ""
        lines.append(
            f"  {spread:<14} {layout.local_experts:>9}  {human_bytes(layout.tokens):>10} "
            f"{human_bytes(layout.gradients):>10} {human_bytes(layout.weights):>10} "
            f"{human_bytes(layout.total):>15} {human_bytes(layout.state):>15}{chosen}"
        )
    lines.append(
        f"  * this run; parallel.expert={mixtures.least_traffic} sends least for the experts"
    )
    return lines


def _site_lines(sites: list[SiteReport]) -> list[str]:
    wide = max(14, *(len(site.family) for site in sites))
    lines = [
        f"{'site':<{wide}} {'copies':>6} {'in x out':>14} {'parameters':>14} {'of dense':>9}  plan"
    ]
    for site in sites:
        shape = f"{site.shape[0]} x {site.shape[1]}"
        ratio = f"{100 * site.parameters / site.dense_parameters:.2f} %"
        lines.append(
            f"{site.family:<{wide}} {site.copies:>6} {shape:>14} {site.parameters:>14,} "
            f"{ratio:>9}  {site.plan}"
        )
        facts = _site_facts(site)
        if facts:
            lines.append(f"{'':<{wide}} {', '.join(facts)}")
    return lines


def _site_facts(site: SiteReport) -> list[str]:
    facts = [f"{site.num_experts} experts"] if site.num_experts else []
    if site.calls > 1:
        facts.append(f"each computes {site.calls} layers")
    if site.num_shared:
        facts.append(f"{site.copies} layers share {site.num_shared} central tensor(s)")
    if site.modes:
        facts.append("modes " + " ".join(f"{i}x{j}" for i, j in site.modes))
        if site.padded:
            facts.append(f"padded to {site.padded[0]} x {site.padded[1]}")
        facts.append("bonds " + " ".join(map(str, site.bonds)))
    if facts:
        facts.append(f"predicted time {site.time_ratio:.2f} x dense")
    return facts
