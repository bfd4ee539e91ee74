"""What `mpotrain plan` prints: a run weighed before any process starts (no torch, no GPU)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpotrain.config import RunConfig
from mpotrain.data.manifest import MANIFEST_NAME, read_manifest
from mpotrain.engine.memory import StateMemory, StepTraffic, state_memory, step_traffic
from mpotrain.errors import MpotrainError
from mpotrain.models.activations import ActivationMemory, activation_memory
from mpotrain.models.config import Site
from mpotrain.nn.config import site_plan
from mpotrain.parallel.plan import batch_layout
from mpotrain.tensor.device import DType
from mpotrain.tensor.plan import PROFILES, ContractionPlan


@dataclass(frozen=True)
class SiteReport:
    """One family of weight matrices.

    Attributes:
        family: key under `model.sites`.
        copies: number of matrices.
        shape: (in, out) of each.
        padded: shape of the operator where it is larger than the matrix, else None.
        modes: one (i, j) for each core; empty when dense.
        bonds: inner bond dimensions.
        parameters: of all copies, biases not counted.
        dense_parameters: of all copies if they were dense.
        plan: the contraction plan in words.
        time_ratio: predicted forward + backward time over a dense layer's.
        kept_bytes: rebuilt matrices kept for the backward pass, all copies.
        transient_bytes: peak of short-lived bytes while one copy is computed.
        flops_per_step: executed FLOPs, forward and backward, all copies and ranks.
    """

    family: str
    copies: int
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
class PlanReport:
    """A run weighed without running it.

    Attributes:
        name: of the run.
        world_size: ranks it was weighed for.
        device: profile of the cost model.
        num_parameters: trainable parameters, tied weights once.
        dense_num_parameters: of the same model with every site dense.
        by_role: parameters by role.
        by_part: parameters by family of sites, biases, norms and positions.
        sites: the families of weight matrices.
        tokens_per_step: of the whole global batch.
        accumulation: micro-batches that each rank accumulates.
        model_flops_per_token: dense-equivalent, forward and backward (for MFU).
        executed_flops_per_step: what the plans execute, attention included.
        state: bytes of weights, masters, gradients and moments of a rank.
        activations: bytes of a micro-batch.
        kept_weights: bytes of rebuilt matrices kept for the backward pass.
        transient: peak of short-lived bytes of a tensorized site.
        traffic: bytes a rank sends in a step.
        checkpoint_bytes: size of one checkpoint.
        problems: why the run cannot start; empty when it can.
        notes: what could not be checked.
    """

    name: str
    world_size: int
    device: str
    num_parameters: int
    dense_num_parameters: int
    by_role: dict[str, int]
    by_part: dict[str, int]
    sites: list[SiteReport]
    tokens_per_step: int
    accumulation: int
    model_flops_per_token: int
    executed_flops_per_step: float
    state: StateMemory
    activations: ActivationMemory
    kept_weights: int
    transient: int
    traffic: StepTraffic
    checkpoint_bytes: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def memory_per_rank(self) -> int:
        """Bytes of one rank's device at the highest point: all of the above together."""
        return self.state.total + self.activations.total + self.kept_weights + self.transient

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, totals included."""
        data = asdict(self)
        for key in ("state", "activations", "traffic"):
            data[key]["total"] = getattr(self, key).total
        data["memory_per_rank"] = self.memory_per_rank
        data["compression"] = self.dense_num_parameters / self.num_parameters
        return data


def weigh(run: RunConfig, world_size: int = 1, device: str | None = None) -> PlanReport:
    """Weigh a run.

    Args:
        run: a validated run.
        world_size: number of ranks.
        device: name of a device profile (`mpotrain.tensor.plan.PROFILES`); by default `cpu`
            where the run asks for it, else `h200`.

    Returns:
        Sizes, plans, FLOPs, memory, traffic and problems.
    """
    model, train = run.model, run.train
    device = device or ("cpu" if run.engine.device == "cpu" else "h200")
    if run.engine.dtype == "bf16" and f"{device}-tf32" in PROFILES:
        # In 16-bit runs cores are merged in TF32 on CUDA.
        device = f"{device}-tf32"
    data_problems, notes = _data_problems(run)
    problems = run.problems(world_size) + data_problems
    try:
        accumulation = batch_layout(
            train.global_batch_size, train.micro_batch_size, world_size
        ).accumulation
    except MpotrainError:
        accumulation = max(1, train.global_batch_size // (train.micro_batch_size * world_size))
    parameters = list(model.parameters())
    sizes = [parameter.size for parameter in parameters]
    tokens = train.micro_batch_size * run.data.sequence_length
    num_microbatches = train.global_batch_size // train.micro_batch_size
    sites = [
        _site_report(
            group,
            run.engine.dtype,
            tokens,
            num_microbatches,
            device,
            forwards=2 if model.activation_checkpointing and group[0].family != "embedding" else 1,
        )
        for group in _families(run)
    ]
    num_tokens = train.global_batch_size * run.data.sequence_length
    passes = 8 if model.activation_checkpointing else 6
    attention = passes * model.num_layers * model.hidden_size * run.data.sequence_length
    return PlanReport(
        name=run.name,
        world_size=world_size,
        device=device,
        num_parameters=sum(sizes),
        dense_num_parameters=sum(sizes)
        + sum(site.dense_parameters - site.parameters for site in sites),
        by_role=dict(_count((p.role, p.size) for p in parameters)),
        by_part=_by_part(run),
        sites=sites,
        tokens_per_step=num_tokens,
        accumulation=accumulation,
        model_flops_per_token=model.flops_per_token(run.data.sequence_length),
        executed_flops_per_step=sum(s.flops_per_step for s in sites) + attention * num_tokens,
        state=state_memory(run.engine, sizes, world_size),
        activations=activation_memory(
            model, tokens, run.data.sequence_length, 2 if run.engine.dtype == "bf16" else 4
        ),
        kept_weights=sum(site.kept_bytes for site in sites),
        transient=max(site.transient_bytes for site in sites),
        traffic=step_traffic(run.engine, sizes, world_size, accumulation),
        checkpoint_bytes=12 * sum(sizes),
        problems=problems,
        notes=notes,
    )


def _data_problems(run: RunConfig) -> tuple[list[str], list[str]]:
    """Hold the manifests of prepared data against the model; what is not there is a note."""
    problems, notes, digests = [], [], set()
    for index, source in enumerate(run.data.sources):
        where = f"data.sources[{index}].path"
        if not (Path(source.path) / MANIFEST_NAME).is_file():
            notes.append(f"{where}: {source.path} is not prepared here; the data were not checked")
            continue
        try:
            manifest = read_manifest(source.path)
        except MpotrainError as error:
            problems.append(f"{where}: {error}")
            continue
        digests.add(manifest.tokenizer.digest)
        if manifest.tokenizer.vocab_size > run.model.vocab_size:
            problems.append(
                f"model.vocab_size: {run.model.vocab_size} is smaller than the vocabulary of "
                f"{source.path}, {manifest.tokenizer.vocab_size}"
            )
    if len(digests) > 1:
        problems.append("data.sources: the folders were prepared with different tokenizers")
    return problems, notes


def _families(run: RunConfig) -> list[list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in run.model.all_sites():
        groups.setdefault(site.family, []).append(site)
    return list(groups.values())


def _count(pairs: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for key, size in pairs:
        total[key] += size
    return total


def _by_part(run: RunConfig) -> dict[str, int]:
    families = {site.name: site.family for site in run.model.all_sites()}

    def part(name: str, site: str | None) -> str:
        if site is None:
            return "positions" if name == "position_embedding" else "norms"
        return "biases" if name.endswith(".bias") else families[site]

    return dict(_count((part(p.name, p.site), p.size) for p in run.model.parameters()))


def _site_report(
    group: list[Site],
    dtype: DType,
    tokens: int,
    num_microbatches: int,
    device: str,
    *,
    forwards: int,
) -> SiteReport:
    site, copies = group[0], len(group)
    dense = site.in_features * site.out_features
    calls = copies * num_microbatches
    if site.spec is None:
        return SiteReport(
            family=site.family,
            copies=copies,
            shape=(site.in_features, site.out_features),
            padded=None,
            modes=[],
            bonds=[],
            parameters=copies * dense,
            dense_parameters=copies * dense,
            plan="dense",
            time_ratio=1.0,
            kept_bytes=0,
            transient_bytes=0,
            flops_per_step=(2.0 * forwards + 4.0) * dense * tokens * calls,
        )
    plan = _site_plan(site, dtype, tokens, device)
    assert plan is not None
    return SiteReport(
        family=site.family,
        copies=copies,
        shape=(site.in_features, site.out_features),
        padded=(site.spec.padded_in, site.spec.padded_out) if site.spec.is_padded else None,
        modes=list(zip(site.spec.in_modes, site.spec.out_modes, strict=True)),
        bonds=list(site.spec.bonds),
        parameters=copies * site.spec.num_parameters,
        dense_parameters=copies * dense,
        plan=_plan_words(plan),
        time_ratio=plan.ratio,
        kept_bytes=copies * plan.saved_bytes,
        transient_bytes=plan.transient_bytes,
        flops_per_step=float(forwards * plan.forward_flops + plan.backward_flops) * calls,
    )


def _site_plan(site: Site, dtype: DType, tokens: int, device: str) -> ContractionPlan | None:
    """Return the plan of a site as its layer will ask for it; None when dense."""
    if site.spec is None or site.choice.kind == "dense":
        return None
    # Of a tied embedding the output layer is the one that costs: the transposed operator.
    spec = site.spec.transposed() if site.family == "embedding" else site.spec
    return site_plan(site.choice, spec, tokens, dtype, PROFILES[device])


def render_operations(run: RunConfig, device: str) -> str:
    """Return every contraction of every family of sites, operation by operation."""
    tokens = run.train.micro_batch_size * run.data.sequence_length
    tables = []
    for group in _families(run):
        plan = _site_plan(group[0], run.engine.dtype, tokens, device)
        if plan is not None:
            tables.append(f"\n{group[0].family}\n{plan.describe()}")
    return "\n".join(tables) or "\nevery site is dense"


def _plan_words(plan: ContractionPlan) -> str:
    if plan.kind == "materialise":
        return "materialise, W kept" if plan.keep_weight else "materialise, W rebuilt in backward"
    sizes = "+".join(str(last - first + 1) for first, last in plan.groups)
    return f"{plan.kind} {sizes} {plan.direction}"


def render(report: PlanReport) -> str:
    """Return the report as text for a terminal."""
    lines = [f"run {report.name}: {report.world_size} rank(s), costs for {report.device}", ""]
    compression = report.dense_num_parameters / report.num_parameters
    lines += [
        f"parameters        {report.num_parameters:>16,}",
        f"  if dense        {report.dense_num_parameters:>16,}   ({compression:.3f} x)",
    ]
    lines += [f"  {'role ' + k:<15} {v:>16,}" for k, v in sorted(report.by_role.items())]
    lines += [f"  {k:<15} {v:>16,}" for k, v in report.by_part.items()]
    lines += ["", *_site_lines(report.sites), ""]
    lines += [
        f"step              {report.tokens_per_step:,} tokens, "
        f"{report.accumulation} micro-batch(es) on each rank",
        f"FLOPs             {report.model_flops_per_token:.4g} per token (dense-equivalent), "
        f"{report.executed_flops_per_step:.4g} per step executed by the plans",
    ]
    state, activations = report.state, report.activations
    lines += [
        f"memory per rank   {human_bytes(report.memory_per_rank)}",
        f"  weights         {human_bytes(state.weights)}",
        f"  masters         {human_bytes(state.masters)}",
        f"  gradients       {human_bytes(state.gradients)}",
        f"  moments         {human_bytes(state.moments)}",
        f"  buffers         {human_bytes(state.buffers)}",
        f"  on host         {human_bytes(state.on_host)} (not counted above)",
        f"  activations     {human_bytes(activations.blocks)} kept by the blocks, "
        f"{human_bytes(activations.output)} at the loss",
        f"  rebuilt W       {human_bytes(report.kept_weights)} kept, "
        f"{human_bytes(report.transient)} short-lived",
        f"traffic per step  {human_bytes(report.traffic.total)} sent by each rank "
        f"(gradients {human_bytes(report.traffic.gradients)}, "
        f"weights {human_bytes(report.traffic.weights)})",
        f"checkpoint        {human_bytes(report.checkpoint_bytes)}",
        "",
    ]
    lines += [f"note: {note}" for note in report.notes]
    if report.problems:
        lines += ["problems:", *(f"  {problem}" for problem in report.problems)]
    else:
        lines.append("no problems found")
    return "\n".join(lines)


def _site_lines(sites: list[SiteReport]) -> list[str]:
    lines = [
        f"{'site':<14} {'copies':>6} {'in x out':>14} {'parameters':>14} {'of dense':>9}  plan"
    ]
    for site in sites:
        shape = f"{site.shape[0]} x {site.shape[1]}"
        ratio = f"{100 * site.parameters / site.dense_parameters:.2f} %"
        lines.append(
            f"{site.family:<14} {site.copies:>6} {shape:>14} {site.parameters:>14,} {ratio:>9}  "
            f"{site.plan}"
        )
        if site.modes:
            modes = " ".join(f"{i}x{j}" for i, j in site.modes)
            bonds = " ".join(map(str, site.bonds))
            padding = f", padded to {site.padded[0]} x {site.padded[1]}" if site.padded else ""
            lines.append(
                f"{'':<14} modes {modes}{padding}, bonds {bonds}, "
                f"predicted time {site.time_ratio:.2f} x dense"
            )
    return lines


def human_bytes(count: int) -> str:
    """Return a number of bytes with a binary unit, three significant digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"
        value /= 1024
    return f"{value:.3g} TiB"
