"""Mixtures of experts against the loop over tokens in `moe_cases`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_cases import FFN, HIDDEN, SITES, mixture, reference
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpotrain.nn.moe.config import RouterConfig
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.roles import experts_of

ROUTERS: dict[str, dict[str, Any]] = {
    "switch": {"capacity_factor": 0.8},
    "mpoe": {"gate": "straight_through", "gate_at": "input", "bias": True},
    "probability at input": {"gate_at": "input", "capacity_factor": 0.5},
    "top-2": {"top_k": 2, "z_loss": 0.1, "capacity_factor": 0.7},
    "top-3 probabilities": {"top_k": 3, "normalise": False, "balance_loss": 0.4},
    "all experts": {"top_k": 5, "balance_rate": 0.1},
}


def activations(seed: int = 2, shape: tuple[int, int] = (3, 7)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64)


def gradients(module: MixtureOfExperts, x: Tensor, y: Tensor, auxiliary: Tensor) -> list[Tensor]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).double()
    objective = (y * upstream).sum() + 3 * auxiliary
    return list(torch.autograd.grad(objective, [x, *module.parameters()], materialize_grads=True))


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())
def test_equals_the_loop_over_tokens(options: dict[str, Any], kind: str) -> None:
    module = mixture(kind, RouterConfig(**options))
    x = activations().requires_grad_()
    y, auxiliary, statistics = module(x)
    wanted = reference(module, x)
    torch.testing.assert_close(y, wanted.y)
    torch.testing.assert_close(auxiliary, wanted.auxiliary_loss)
    assert statistics.keys() == wanted.statistics.keys()
    for name, value in statistics.items():
        torch.testing.assert_close(value, wanted.statistics[name].float(), msg=name)
    if "capacity_factor" in options:
        assert float(statistics["dropped"]) > 0
    ours = gradients(module, x, y, auxiliary)
    theirs = gradients(module, x, wanted.y, wanted.auxiliary_loss)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("kind", SITES)
def test_one_expert_takes_all_tokens_and_the_others_rest(kind: str) -> None:
    module = mixture(kind, RouterConfig(bias=True, gate="straight_through"))
    assert module.router.bias is not None
    module.router.bias.data[3] = 50.0
    x = activations().requires_grad_()
    y, auxiliary, statistics = module(x)
    torch.testing.assert_close(y, reference(module, x).y)
    assert statistics["expert_tokens"].tolist() == [0, 0, 0, 21, 0]
    (y.square().sum() + auxiliary).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if experts_of(parameter):
            assert float(parameter.grad[3].abs().max()) > 0, name
            assert float(parameter.grad[[0, 1, 2, 4]].abs().max()) == 0, name
    if isinstance(module.c_fc, MPOExperts):
        assert float(module.c_fc.central.grad.abs().max()) > 0


def test_equal_experts_with_straight_through_gates_are_one_feed_forward_layer() -> None:
    """The identity behind conversions of dense models, whatever the router chooses."""
    for options in ({"gate": "straight_through"}, {"top_k": 2}):
        for kind in SITES:
            module = mixture(kind, RouterConfig(**options))
            with torch.no_grad():
                for layer in (module.c_fc, module.c_proj):
                    for name, parameter in layer.named_parameters():
                        if name != "central":
                            parameter[:] = parameter[0].clone()
            x = activations()
            only = mixture(kind, RouterConfig(gate="straight_through"), num_experts=1)
            only.load_state_dict(
                {
                    name: value[:1] if not name.endswith("central") else value
                    for name, value in module.state_dict().items()
                }
            )
            torch.testing.assert_close(module(x)[0], only(x)[0])


def test_dropped_tokens_get_nothing() -> None:
    module = mixture("dense", RouterConfig(capacity_factor=1e-9))
    y, _, statistics = module(activations())
    kept = 21 - int(statistics["dropped"])
    assert 1 <= kept <= 5
    assert int((y.abs().amax(-1) > 0).sum()) == kept
    assert int((module.eval()(activations())[0].abs().amax(-1) > 0).sum()) == 21


def test_jitter_reaches_the_router_alone() -> None:
    module = mixture("dense", RouterConfig(jitter=0.4, capacity_factor=0.8))
    x = activations()
    torch.manual_seed(4)
    y, auxiliary, _ = module(x)
    torch.manual_seed(4)
    noise = torch.empty(21, HIDDEN, dtype=torch.float64).uniform_(0.6, 1.4)
    wanted = reference(module, x, noise)
    torch.testing.assert_close(y, wanted.y)
    torch.testing.assert_close(auxiliary, wanted.auxiliary_loss)
    assert not torch.allclose(auxiliary, reference(module, x).auxiliary_loss)


def test_evaluation_uses_its_own_capacity_and_no_noise() -> None:
    options = {"jitter": 0.4, "capacity_factor": 4.0, "eval_capacity_factor": 0.6}
    module = mixture("mpo", RouterConfig(**options)).eval()
    with torch.no_grad():
        y, _, statistics = module(activations())
        torch.testing.assert_close(y, reference(module, activations()).y)
    assert float(statistics["dropped"]) > 0


@pytest.mark.parametrize("kind", SITES)
def test_activation_checkpointing_changes_nothing(kind: str) -> None:
    module = mixture(kind, RouterConfig(top_k=2, jitter=0.2, capacity_factor=0.9))
    results = []
    for recompute in (False, True):
        x = activations().requires_grad_()
        torch.manual_seed(7)
        outputs = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        y, auxiliary, statistics = outputs
        results.append([y, auxiliary, *statistics.values(), *gradients(module, x, y, auxiliary)])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_layers_are_planned_for_shapes_and_not_for_loads() -> None:
    module = mixture("dense", RouterConfig(top_k=2, capacity_factor=0.5))
    asked: list[int] = []

    def note(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        asked.append(arguments[2])

    for layer in (module.c_fc, module.c_proj):
        layer.register_forward_pre_hook(note)
    module(activations())
    assert asked == [42, 42]


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("options", [ROUTERS["mpoe"], ROUTERS["top-2"]], ids=["mpoe", "top-2"])
def test_sixteen_bit_activations(kind: str, options: dict[str, Any]) -> None:
    module = mixture(kind, RouterConfig(**options)).float()
    x = activations().bfloat16().requires_grad_()
    y, auxiliary, _ = module(x)
    assert y.dtype == torch.bfloat16
    assert auxiliary.dtype == torch.float32
    wanted, same, _ = module(x.detach().float())
    torch.testing.assert_close(auxiliary, same)
    torch.testing.assert_close(y.float(), wanted, rtol=5e-2, atol=5e-2)
    (y.float().sum() + auxiliary).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_parameters_have_their_names() -> None:
    names = [name for name, _ in mixture("mpo", RouterConfig(bias=True)).named_parameters()]
    assert names == [
        "router.weight",
        "router.bias",
        "c_fc.central",
        "c_fc.bias",
        *(f"c_fc.auxiliaries.{k}" for k in range(4)),
        "c_proj.central",
        "c_proj.bias",
        *(f"c_proj.auxiliaries.{k}" for k in range(2)),
    ]
    module = mixture("dense", RouterConfig(balance_rate=0.1))
    assert isinstance(module.c_fc, DenseExperts)
    assert [name for name, _ in module.named_buffers()] == ["router.balance"]


def test_single_expert_is_the_dense_layer() -> None:
    module = mixture("dense", RouterConfig(), num_experts=1)
    x = activations()
    inside = functional.gelu(x @ module.c_fc.weight[0] + module.c_fc.bias[0], approximate="tanh")
    y, _, _ = module(x)
    torch.testing.assert_close(y, inside @ module.c_proj.weight[0] + module.c_proj.bias[0])
    assert inside.shape[-1] == FFN
