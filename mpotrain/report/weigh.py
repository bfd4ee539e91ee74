"""A run weighed before any process starts (no torch, no GPU)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpotrain.config import RunConfig, vocabulary_problem
from mpotrain.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.traffic import GridTraffic
from mpotrain.engine.memory import StateMemory, StepTraffic, state_memory, step_traffic
from mpotrain.errors import DataError, MpotrainError
from mpotrain.models.activations import ActivationMemory, activation_memory
from mpotrain.models.network import ROUTER
from mpotrain.models.sites import ParameterInfo
from mpotrain.parallel.plan import batch_layout
from mpotrain.report.grid import GridReport, grid_report
from mpotrain.report.mixtures import MixtureReport, expert_sizes, mixture_report
from mpotrain.report.sites import SiteReport, site_reports
from mpotrain.tensor.device import BYTES, PROFILES


@dataclass(frozen=True)
class PlanReport:
    """A run weighed without running it.

    Attributes:
        name: of the run.
        world_size: ranks it was weighed for.
        device: profile of the cost model.
        num_parameters: trainable parameters, tied weights once.
        body_parameters: of them, without routers and without the heads of pretraining.
        apart: which of these two there are.
        dense_num_parameters: of the same model with every site dense.
        by_role: parameters by role.
        by_part: parameters by family of sites, biases, norms and positions.
        sites: the families of weight matrices.
        tokens_per_step: of the whole global batch.
        accumulation: micro-batches that each rank accumulates.
        model_flops_per_token: dense-equivalent, forward and backward (for MFU).
        executed_flops_per_step: what the plans execute, attention and adapters included.
        state: bytes of weights, masters, gradients and moments of a rank.
        activations: bytes of a micro-batch.
        kept_by_plans: bytes that contraction plans keep for the backward pass.
        transient: peak of short-lived bytes of a tensorized site.
        traffic: bytes a rank sends in a step.
        checkpoint_bytes: size of one checkpoint.
        mixtures: of experts; None without any.
        grid: ranks and stages of the Megatron engine, of which the fullest stage's memory and the
            busiest one's traffic stand above; None under another engine.
        problems: why the run cannot start; empty when it can.
        notes: what could not be checked.
    """

    name: str
    world_size: int
    device: str
    num_parameters: int
    body_parameters: int
    apart: list[str]
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
    kept_by_plans: int
    transient: int
    traffic: StepTraffic | GridTraffic
    checkpoint_bytes: int
    mixtures: MixtureReport | None = None
    grid: GridReport | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def memory_per_rank(self) -> int:
        """Bytes of one rank's device at the highest point: all of the above together."""
        return self.state.total + self.activations.total + self.kept_by_plans + self.transient

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, totals included."""
        data = asdict(self)
        for key in ("state", "activations", "traffic"):
            data[key]["total"] = getattr(self, key).total
        for layout, plain in zip(
            self.mixtures.layouts if self.mixtures else [],
            data["mixtures"]["layouts"] if self.mixtures else [],
            strict=True,
        ):
            plain["total"] = layout.total
        data["grid"] = None if self.grid is None else self.grid.to_json()
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
    device = _profile(run, device)
    data_problems, notes = _data_problems(run)
    accumulation = _accumulation(run, run.parallel.data_ranks(world_size))
    sizes = [parameter.size for parameter in model.parameters()]
    lengths = run.sample_lengths()
    sites = site_reports(run, device, accumulation)
    grid = grid_report(run, world_size, accumulation, sites)
    num_tokens = train.global_batch_size * lengths.inputs
    passes = 8 if model.activation_checkpointing else 6
    beside_sites = model.attention_flops(lengths) + model.adapter_flops(lengths)
    beside_sites = passes * beside_sites * train.global_batch_size // 6
    costs = _costs(run, world_size, accumulation, sites, grid)
    buffers = sum(buffer.size for buffer in model.buffers())
    return PlanReport(
        name=run.name,
        world_size=world_size,
        device=device,
        num_parameters=sum(sizes),
        body_parameters=model.body_parameters(),
        apart=_apart(run),
        dense_num_parameters=sum(sizes)
        + sum(site.dense_parameters - site.parameters for site in sites),
        by_role=dict(_count((p.role, p.size) for p in model.parameters())),
        by_part=_by_part(run),
        sites=sites,
        tokens_per_step=num_tokens,
        accumulation=accumulation,
        model_flops_per_token=model.flops_per_token(run.sample_lengths()),
        executed_flops_per_step=sum(s.flops_per_step for s in sites) + beside_sites,
        state=costs.state,
        activations=costs.activations,
        kept_by_plans=costs.kept_by_plans,
        transient=max(site.transient_bytes for site in sites),
        traffic=costs.traffic,
        checkpoint_bytes=12 * sum(sizes) + 4 * buffers,
        mixtures=mixture_report(run, world_size, accumulation),
        grid=grid,
        problems=run.problems(world_size) + data_problems,
        notes=notes + _capacity_notes(run) + _grid_notes(run, grid),
    )


@dataclass(frozen=True)
class _Costs:
    """What the fullest and the busiest rank need."""

    state: StateMemory
    activations: ActivationMemory
    kept_by_plans: int
    traffic: StepTraffic | GridTraffic


def _costs(
    run: RunConfig,
    world_size: int,
    accumulation: int,
    sites: list[SiteReport],
    grid: GridReport | None,
) -> _Costs:
    if grid is not None:
        fullest = grid.stages[grid.fullest]
        traffic = grid.stages[grid.busiest].traffic
        return _Costs(fullest.state, fullest.activations, fullest.kept_by_plans, traffic)
    sizes = [parameter.size for parameter in run.model.parameters()]
    experts = expert_sizes(run, world_size)
    width, samples = BYTES[run.engine.dtype], run.train.micro_batch_size
    return _Costs(
        state_memory(run.engine, sizes, world_size, experts),
        activation_memory(run.model, run.sample_lengths(), samples, width),
        sum(site.kept_bytes for site in sites),
        step_traffic(run.engine, sizes, world_size, accumulation, experts),
    )


def _grid_notes(run: RunConfig, grid: GridReport | None) -> list[str]:
    if grid is not None or not isinstance(run.engine, MegatronConfig):
        return []
    return [
        "parallel: the degrees do not divide the world, so memory and traffic above are those of a "
        "rank that holds the whole network"
    ]


def _capacity_notes(run: RunConfig) -> list[str]:
    moe = run.model.moe
    if moe is None or moe.router.top_k == 1 or moe.router.eval_capacity_factor is None:
        return []
    return [
        "model.moe.router.eval_capacity_factor: with top_k above 1 a later token can displace the "
        "second choice of an earlier one, so the validation loss sees a little of the future"
    ]


def _profile(run: RunConfig, device: str | None) -> str:
    device = device or ("cpu" if run.engine.device == "cpu" else "h200")
    # In 16-bit runs cores are merged in TF32 on CUDA.
    allows_tf32 = run.engine.dtype == "bf16" and f"{device}-tf32" in PROFILES
    return f"{device}-tf32" if allows_tf32 else device


def _accumulation(run: RunConfig, world_size: int) -> int:
    train = run.train
    try:
        return batch_layout(
            train.global_batch_size, train.micro_batch_size, world_size
        ).accumulation
    except MpotrainError:
        return max(1, train.global_batch_size // (train.micro_batch_size * world_size))


def _data_problems(run: RunConfig) -> tuple[list[str], list[str]]:
    """Hold the manifests of prepared data against the model; what is not there is a note."""
    problems, notes, digests = [], [], set()
    if run.train.eval_every and run.data.split[1] == 0:
        # No mistake of the file itself: `mpotrain eval` may read all of it as one split.
        problems.append(
            "data.split: gives no documents to validation, but train.eval_every is "
            f"{run.train.eval_every}; give validation a fraction, or leave eval_every out"
        )
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
        try:
            run.data.objective.special(manifest.tokenizer)
        except MpotrainError as error:
            problems.append(str(error))
        problem = vocabulary_problem(run, manifest.tokenizer.vocab_size, source.path)
        problems += [] if problem is None else [problem]
        problems += [f"{where}: {text}" for text in _split_problems(run, source.path, manifest)]
    if len(digests) > 1:
        problems.append("data.sources: the folders were prepared with different tokenizers")
    return problems, notes


def _split_problems(run: RunConfig, folder: str, manifest: Manifest) -> list[str]:
    """Return which splits that the run opens hold less than one sample of a prepared folder."""
    # A plan without data at hand needs no numpy.
    from mpotrain.data.dataset import shortage
    from mpotrain.data.stream import Split, split_size

    fractions = run.data.split
    length = run.data.objective.window(run.data.sequence_length).length
    opened: list[Split] = ["train"]
    if run.train.eval_every and fractions[1] > 0:
        opened.append("validation")
    found: list[str] = []
    for split in opened:
        try:
            size = split_size(Path(folder), manifest, split, fractions, length)
        except DataError as error:
            return [*found, str(error)]
        problem = shortage(manifest, split, fractions, size, length)
        found += [] if problem is None else [f"{folder}: {problem}"]
    return found


def _count(pairs: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for key, size in pairs:
        total[key] += size
    return total


def _by_part(run: RunConfig) -> dict[str, int]:
    families = {site.name: site.family for site in run.model.all_sites()}

    def part(info: ParameterInfo) -> str:
        if info.site is None:
            return info.part
        return "biases" if info.name.endswith(".bias") else families[info.site]

    return dict(_count((part(p), p.size) for p in run.model.parameters()))


def _apart(run: RunConfig) -> list[str]:
    """Return what published sizes leave out and the model has."""
    sites = run.model.all_sites()
    kinds = {
        "routers": any(site.family == ROUTER for site in sites),
        "heads": any(site.is_head for site in sites),
    }
    return [kind for kind, present in kinds.items() if present]
