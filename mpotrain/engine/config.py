"""Sections of the run file that choose and tune the engine (no torch)."""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Annotated, Literal

from pydantic import Field

from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.parallel.plan import DEGREES, ParallelConfig
from mpotrain.schema import collect_problems, config

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["fp32", "bf16"]


@config
class CentralMaskConfig:
    """Random rest of the central tensors, so that auxiliaries learn more often (Gao et al. 2022).

    A masked tensor keeps its value, its moments and its update counter bit for bit (a masked
    element its value and moments). The draws are a function of (seed, step, tensor), so every rank
    takes the same decision.
    """

    probability: float = 0.0
    """Probability p_b that an update of a central tensor is discarded; 1 freezes it."""
    granularity: Literal["step", "tensor", "element"] = "step"
    """One draw for each step, for each tensor and step, or for each element and step."""

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section, one line each.

        Args:
            where: dotted key of this section.
        """
        if 0 <= self.probability <= 1:
            return []
        return [f"{where}.probability: must be in [0, 1], is {self.probability}"]


NO_MASK = CentralMaskConfig()
"""Every update of a central tensor is applied."""


@config
class LocalConfig:
    """One process, plain torch: the reference that every other engine is held against."""

    kind: Literal["local"] = "local"
    """Name of the engine."""
    dtype: Dtype = "fp32"
    """What the model computes in; parameters, gradients and moments stay fp32."""
    device: Device = "auto"
    """Where to compute; "auto" takes CUDA where there is any."""


@config
class DeepSpeedConfig:
    """DeepSpeed ZeRO over any number of data-parallel ranks (Rajbhandari et al. 2020)."""

    kind: Literal["deepspeed"] = "deepspeed"
    """Name of the engine."""
    dtype: Dtype = "fp32"
    """Dtype of weights and activations; masters, moments and gradient sums are always fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ranks split: 0 nothing, 1 optimizer state, 2 gradients as well, 3 weights as well."""
    offload_optimizer: bool = False
    """Keep masters and moments in host memory and update there (stage 1 and higher)."""
    offload_parameters: bool = False
    """Keep split weights in host memory (stage 3)."""
    reduce_dtype: Dtype = "fp32"
    """Dtype in which gradients are summed over ranks; bf16 halves the traffic of bf16 weights and
    loses bits as the world grows."""
    overlap_communication: bool = True
    """Reduce gradients while backward goes on (stages 2 and 3)."""
    reduce_bucket_elements: int = 50_000_000
    """Gradient elements reduced in one message; two such buffers are held."""
    gather_bucket_elements: int = 50_000_000
    """Updated weight elements gathered in one message (stages 1 and 2)."""
    prefetch_elements: int = 50_000_000
    """Weight elements fetched ahead of their use (stage 3)."""
    persistence_threshold: int = 100_000
    """Weights up to this size are never split (stage 3): most cores stay whole on every rank."""
    max_live_elements: int = 1_000_000_000
    """Weight elements held whole at a time (stage 3)."""
    device: Device = "auto"
    """Where to compute; "auto" takes CUDA where there is any."""

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section itself, one line each.

        Args:
            where: dotted key of this section.
        """
        checks = (
            _stage_problems,
            _reduce_problems,
            _masters_problems,
            _weights_problems,
            _halves_problems,
        )
        return collect_problems(
            *(partial(check, self, where) for check in checks),
            *(partial(_size_problems, self, where, *least) for least in _AT_LEAST.items()),
        )


EngineConfig = Annotated[
    LocalConfig | DeepSpeedConfig | MegatronConfig, Field(discriminator="kind")
]
"""The engine section: tagged by `kind`."""


def expert_problems(
    engine: EngineConfig,
    expert_ranks: int,
    num_experts: int | None,
    world_size: int | None = None,
) -> list[str]:
    """Return why experts cannot be spread as asked, one line each.

    Under the Megatron engine that depends on all degrees, see
    `mpotrain.engine.megatron.problems`.

    Args:
        engine: the engine section.
        expert_ranks: `parallel.expert`.
        num_experts: experts of each mixture; None = the model has no mixture.
        world_size: number of processes where it is known.
    """
    where = "parallel.expert"
    if expert_ranks <= 1 or isinstance(engine, MegatronConfig):
        return []  # below 1 the section itself says so
    if num_experts is None:
        return [f"{where}: {expert_ranks}, but the model has no mixture of experts (model.moe)"]
    found = []
    # What divides both divides their greatest common divisor.
    common = gcd(num_experts, world_size or num_experts)
    possible = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
    if num_experts % expert_ranks:
        found.append(
            f"{where}: {expert_ranks} ranks do not divide the {num_experts} experts "
            f"(model.moe.num_experts); possible: {possible}"
        )
    if world_size is not None and world_size % expert_ranks:
        found.append(
            f"{where}: {expert_ranks} ranks do not divide the world of {world_size}; possible: "
            f"{possible}"
        )
    if isinstance(engine, LocalConfig):
        found.append(
            f'{where}: {expert_ranks}, but the local engine runs one process; use engine.kind="'
            'deepspeed", or parallel.expert=1'
        )
    elif engine.zero_stage == 3:
        found.append(
            f"{where}: {expert_ranks} with engine.zero_stage 3 is refused, as by DeepSpeed 0.19.8, "
            "which splits every weight over the whole world and not over the ranks that hold the "
            "same experts; use stage 1 or 2, or parallel.expert=1"
        )
    elif engine.zero_stage == 0:
        found.append(
            f"{where}: {expert_ranks} with engine.zero_stage 0 is refused: every rank would have "
            "to hold the whole optimizer state, also of experts that it does not hold; use stage "
            "1 or 2, or parallel.expert=1"
        )
    return found


def uncut_problems(engine: EngineConfig, parallel: ParallelConfig) -> list[str]:
    """Return the degrees that cut the network, under an engine that does not, one line each.

    Args:
        engine: the engine section.
        parallel: the degrees.
    """
    if isinstance(engine, MegatronConfig):
        return []
    asked = {key: getattr(parallel, key) for key in DEGREES if key != "expert"}
    found = [(key, str(ranks), "1") for key, ranks in asked.items() if ranks > 1]
    if parallel.sequence:
        found.append(("sequence", "true", "false"))
    return [
        f"parallel.{key}: {value}, but the {engine.kind} engine does not cut the network; use "
        f'engine.kind="megatron", or parallel.{key}={without}'
        for key, value, without in found
    ]


def problems(engine: EngineConfig, world_size: int | None, where: str) -> list[str]:
    """Return every combination that cannot run, one line each, with the reason.

    Args:
        engine: the section.
        world_size: number of processes where it is known.
        where: dotted key of the section.
    """
    if isinstance(engine, LocalConfig):
        return _local_problems(world_size, where)
    return engine.problems(where)


def _local_problems(world_size: int | None, where: str) -> list[str]:
    if world_size is None or world_size == 1:
        return []
    return [
        f"{where}.kind: the local engine runs one process, but the world has {world_size}; "
        f'start one process, or set {where}.kind="deepspeed"'
    ]


_AT_LEAST = {
    "reduce_bucket_elements": 1,
    "gather_bucket_elements": 1,
    "prefetch_elements": 0,
    "persistence_threshold": 0,
    "max_live_elements": 0,
}


def _stage_problems(engine: DeepSpeedConfig, where: str) -> list[str]:
    if engine.dtype != "bf16" or engine.zero_stage != 0:
        return []
    return [
        f"{where}.zero_stage: 0 with 16-bit weights is refused: DeepSpeed 0.19.8 sets up its "
        "optimizer there by a real step with zero gradients, so training would start with "
        "Adam's counter at 1 and weights already decayed; use stage 1, or dtype fp32"
    ]


def _reduce_problems(engine: DeepSpeedConfig, where: str) -> list[str]:
    if engine.reduce_dtype != "bf16" or engine.dtype == "bf16":
        return []
    return [
        f"{where}.reduce_dtype: bf16 sums beside {engine.dtype} weights lose what the weights "
        "keep; use fp32"
    ]


def _masters_problems(engine: DeepSpeedConfig, where: str) -> list[str]:
    if not engine.offload_optimizer or engine.zero_stage != 0:
        return []
    return [
        f"{where}.offload_optimizer: stage 0 keeps the optimizer whole on the device and has "
        "nothing to offload; use stage 1, 2 or 3"
    ]


def _weights_problems(engine: DeepSpeedConfig, where: str) -> list[str]:
    if not engine.offload_parameters or engine.zero_stage == 3:
        return []
    return [
        f"{where}.offload_parameters: only stage 3 splits weights, and only split weights are "
        f"offloaded (stage is {engine.zero_stage}); use stage 3"
    ]


def _halves_problems(engine: DeepSpeedConfig, where: str) -> list[str]:
    if not engine.offload_parameters or engine.offload_optimizer:
        return []
    return [
        f"{where}.offload_parameters: weights in host memory beside masters on the device save "
        "the smaller part; set offload_optimizer=true as well"
    ]


def _size_problems(engine: DeepSpeedConfig, where: str, key: str, least: int) -> list[str]:
    elements = getattr(engine, key)
    if elements >= least:
        return []
    return [f"{where}.{key}: {elements}; it must be at least {least}"]
