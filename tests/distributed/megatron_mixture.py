"""Mixtures of the Megatron engine beside the local mixture with the same weights, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from distributed.megatron_comparison import DOUBLE, difference, draw
from distributed.megatron_grid import megatron_grid
from torch import Tensor

from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.micro import Micro, Tally, positions_of_rank
from mpotrain.models.building import SiteBuilder
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    ExpertPlanChoice,
    ExpertSiteConfig,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

HIDDEN, FFN, EXPERTS, BATCH, LENGTH = 16, 32, 4, 2, 8
NAME = "blocks.0.ffn"


def _mpo(in_modes: tuple[int, ...], out_modes: tuple[int, ...], cap: int = 6) -> MPOExpertSite:
    return MPOExpertSite(in_modes=in_modes, out_modes=out_modes, cap=cap)


# Five cores as published, the central tensor largest; three whose inner features lie in
# auxiliaries alone; one matrix cut at its central tensor that meets one cut at an auxiliary.
PUBLISHED = (_mpo((2, 2, 2, 2, 1), (2, 2, 4, 2, 1)), _mpo((2, 2, 4, 2, 1), (2, 1, 2, 2, 2)))
OUTSIDE = (_mpo((2, 4, 2), (1, 1, 32)), _mpo((1, 1, 32), (4, 4, 1)))
ACROSS = (_mpo((2, 4, 2), (2, 4, 4)), _mpo((8, 1, 4), (4, 2, 2)))
ASYMMETRIC = (
    AsymmetricExpertSite(in_mode=8, out_mode=4, in_bond=3, bias=False),
    AsymmetricExpertSite(in_mode=8, out_mode=4),
)
DENSE = (DenseExpertSite(), DenseExpertSite())
HALF_DENSE = (DenseExpertSite(), _mpo((4, 4, 2), (4, 2, 2)))


@dataclass(frozen=True)
class Case:
    """A mixture and how it is run."""

    sites: tuple[ExpertSiteConfig, ExpertSiteConfig] = PUBLISHED
    router: dict[str, Any] = field(default_factory=dict)
    dispatcher: str = "alltoall"
    plan: ExpertPlanChoice = "auto"
    favourite: int | None = None
    recompute: bool = False
    break_it: str = ""

    def model(self) -> GPT2Config:
        c_fc, c_proj = (
            site if isinstance(site, DenseExpertSite) else replace(site, plan=self.plan)
            for site in self.sites
        )
        router = {"balance_loss": 0.3, "z_loss": 0.2} | self.router
        return GPT2Config(
            vocab_size=8,
            context_length=LENGTH,
            hidden_size=HIDDEN,
            num_layers=1,
            num_heads=2,
            ffn_size=FFN,
            moe=MoEConfig(
                num_experts=EXPERTS, router=RouterConfig(**router), c_fc=c_fc, c_proj=c_proj
            ),
        )


def local_mixture(case: Case) -> MixtureOfExperts:
    """Every parameter, biases too, and the selection biases have values of their own."""
    model = case.model()
    sites = {site.name: site for site in model.all_sites()}
    assert model.moe is not None
    module = SiteBuilder(model, 3).mixture(model.moe, NAME, sites).to(DOUBLE)
    with torch.no_grad():
        for n, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * draw(*parameter.shape, seed=50 + n))
        if module.router.balance is not None:
            module.router.balance.copy_(torch.linspace(0.1, -0.1, EXPERTS))
            if case.favourite is not None:
                module.router.balance[case.favourite] = 10.0
    return module


@dataclass
class Expected:
    """What the local mixture makes of the micro-batches of all data-parallel ranks."""

    outputs: list[Tensor]
    statistics: list[dict[str, Tensor]]
    inputs: list[Tensor]
    gradients: dict[str, Tensor]


def scale_of(data_rank: int) -> float:
    """What the auxiliary loss of a micro-batch weighs: another number for each."""
    return 5.0 + 3.0 * data_rank


def tokens_of(data_rank: int) -> tuple[Tensor, Tensor]:
    """Tokens of a micro-batch (B, T, H), and the gradient of what becomes of them."""
    shape = (BATCH, LENGTH, HIDDEN)
    return draw(*shape, seed=300 + data_rank), draw(*shape, seed=400 + data_rank)


def expect(case: Case, data_ranks: int) -> Expected:
    module = local_mixture(case)
    found = Expected([], [], [], {})
    for rank in range(data_ranks):
        x, upstream = tokens_of(rank)
        x.requires_grad_()
        y, auxiliary, statistics = module(x)
        ((y * upstream).sum() + scale_of(rank) * auxiliary).backward()
        assert x.grad is not None
        found.outputs.append(y.detach())
        found.statistics.append(statistics)
        found.inputs.append(x.grad)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found.gradients[f"{NAME}.{name}"] = parameter.grad
    return found


def mixture_source(case: Case, parallel: ParallelConfig, dtype: torch.dtype) -> Any:
    from mpotrain.engine.megatron.feature_cuts import feature_periods
    from mpotrain.engine.megatron.slots import Slots, Whole
    from mpotrain.engine.megatron.sources import MixtureSource
    from mpotrain.nn.roles import Role

    model = case.model()
    assert model.moe is not None
    wholes = {
        info.name: Whole(info.shape, Role(info.role), info.num_experts)
        for info in model.parameters()
    }
    sites = {site.name: site for site in model.all_sites()}
    router, c_fc, c_proj = (sites[f"{NAME}.{leaf}"] for leaf in ("router", "c_fc", "c_proj"))
    return MixtureSource(
        slots=Slots(wholes, device=torch.device("cpu"), dtype=dtype),
        name=NAME,
        moe=model.moe,
        router=router,
        c_fc=c_fc,
        c_proj=c_proj,
        period=feature_periods(model, 1, parallel.expert_tensor).expert,
        activation="gelu_tanh",
    )


def engine_mixture(case: Case, parallel: ParallelConfig, dtype: torch.dtype = DOUBLE) -> Any:
    """Build the layer of this rank and give it its part of the weights of the local mixture."""
    from megatron.core.transformer.spec_utils import build_module

    from mpotrain.engine.megatron.mixture import mixture_layer
    from mpotrain.engine.megatron.placement import placement_of
    from mpotrain.engine.megatron.settings import transformer_config

    engine = MegatronConfig(moe_dispatcher=case.dispatcher)  # type: ignore[arg-type]
    config = transformer_config(case.model(), engine, parallel, on_cuda=False)
    config.params_dtype = dtype
    layer = build_module(mixture_layer(mixture_source(case, parallel, dtype)), config=config)
    local = local_mixture(case)
    tensors = {f"{NAME}.{name}": p.detach() for name, p in local.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            placement = placement_of(parameter)
            parameter.copy_(placement.take(tensors[placement.name]))
        if layer.router.balance is not None:
            layer.router.balance.copy_(local.router.balance)
    return layer


def mine(x: Tensor, parallel: ParallelConfig) -> Tensor:
    """Return this rank's tokens of a micro-batch (B, T, H), as (t, B, H)."""
    from megatron.core import parallel_state as state

    context = positions_of_rank(x.shape[1], parallel.context, state.get_context_parallel_rank())
    tokens = x[:, context].transpose(0, 1)
    if parallel.sequence and parallel.tensor > 1:
        tokens = tokens.chunk(parallel.tensor)[state.get_tensor_model_parallel_rank()]
    return tokens.contiguous()


def errors(case: Case, parallel: ParallelConfig) -> dict[str, float]:
    """Return relative differences to the local mixture: output, input, statistics, gradients."""
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel import checkpoint

    rank = state.get_data_parallel_rank()
    expected = expect(case, state.get_data_parallel_world_size())
    layer = engine_mixture(case, parallel)
    micro = Micro(0, True, 1.0, scale_of(rank), Tally())
    x, upstream = (mine(part, parallel) for part in tokens_of(rank))
    x.requires_grad_()
    with broken(case.break_it):
        if case.recompute:
            y = checkpoint(lambda tokens: layer(tokens, micro)[0], False, x)
        else:
            y, bias = layer(x, micro)
            assert bias is None
        told = dict(micro.tally.told)
        micro.tally.is_open = False
        (y * upstream).sum().backward()
    assert micro.tally.told == told
    assert x.grad is not None
    found = {
        "output": difference(y.detach(), mine(expected.outputs[rank], parallel)),
        "input": difference(x.grad, mine(expected.inputs[rank], parallel)),
    }
    for name, value in expected.statistics[rank].items():
        found[name] = float((told[NAME][name] - value).abs().max() / value.abs().max().clamp_min(1))
    return found | gradient_errors(layer, expected.gradients, case.break_it)


def gradient_errors(
    layer: torch.nn.Module, expected: dict[str, Tensor], break_it: str
) -> dict[str, float]:
    """Reduce gradients as the engine does, and compare each rank's own part."""
    from megatron.core import parallel_state as state

    from mpotrain.engine.megatron.placement import placement_of

    found = {}
    covered = {name: torch.zeros(tensor.shape) for name, tensor in expected.items()}
    for parameter in layer.parameters():
        placement = placement_of(parameter)
        assert parameter.grad is not None, placement.name
        grad = parameter.grad.clone()
        as_expert = break_it == "central as expert" and placement.name.endswith("central")
        if placement.is_expert or as_expert:
            dist.all_reduce(grad, group=state.get_expert_data_parallel_group())
        else:
            dist.all_reduce(grad, group=state.get_data_parallel_group(with_context_parallel=True))
        if placement.is_partial and break_it != "nothing is partial":
            dist.all_reduce(grad, group=state.get_tensor_model_parallel_group())
        wanted = expected[placement.name]
        part = placement.take(wanted)
        assert grad.shape == part.shape
        scale = wanted.abs().max()
        found[placement.name] = float((grad - part).abs().max() / scale)
        placement.put(covered[placement.name], torch.ones(grad.shape))
    for name, tensor in covered.items():
        dist.all_reduce(tensor)
        assert tensor.min() >= 1, f"no rank holds all of {name}"
    return found


def placement_part(parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> Tensor:
    """Return what belongs to a parameter of this rank among whole tensors."""
    from mpotrain.engine.megatron.placement import placement_of

    placement = placement_of(parameter)
    return placement.take(tensors[placement.name])


@contextmanager
def broken(what: str) -> Iterator[None]:
    """Break the layer in one of several ways, for negative controls."""
    from mpotrain.engine.megatron import expert_matrices
    from mpotrain.engine.megatron.expert_matrices import ExpertMatrices
    from mpotrain.engine.megatron.routing import LogicalRouter

    swaps: dict[str, tuple[Any, str, Any]] = {
        "gradients are not summed": (
            expert_matrices,
            "sum_gradients",
            lambda group, *tensors: tensors,
        ),
        "losses of each rank": (LogicalRouter, "_of_micro_batch", lambda self, sums: sums),
        "bias on every rank": (
            ExpertMatrices,
            "_bias",
            lambda self: self.read("bias") if self.owns("bias") else None,
        ),
    }
    if what not in swaps:
        yield
        return
    owner, name, wrong = swaps[what]
    right = getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)


def compare(
    world: World, parallel: ParallelConfig, cases: dict[str, Case]
) -> dict[str, dict[str, float]]:
    """Return the differences of each case on this rank."""
    with megatron_grid(world, parallel):
        return {name: errors(case, parallel) for name, case in cases.items()}
