"""Parameter groups, and the AdamW update that follows from them."""

import pytest
import torch
from torch import nn

from mpotrain.nn.roles import Role, set_role
from mpotrain.train.config import AdamWConfig
from mpotrain.train.optim import GROUP_NAMES, build_optimizer, parameter_groups

CONFIG = AdamWConfig(weight_decay=0.1, core_lr_factor=0.5, core_weight_decay=0.01)


class Toy(nn.Module):
    """Every sort of parameter once, cores and dense ones in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.core_0 = set_role(nn.Parameter(torch.randn(1, 2, 2, 3)), Role.AUXILIARY)
        self.norm = nn.LayerNorm(4)
        self.core_1 = set_role(nn.Parameter(torch.randn(3, 2, 2, 1)), Role.CENTRAL)
        self.linear = nn.Linear(4, 4)
        self.expert = set_role(nn.Parameter(torch.randn(2, 3)), Role.EXPERT)
        self.expert_bias = set_role(nn.Parameter(torch.randn(3)), Role.EXPERT)
        self.adapter = set_role(nn.Parameter(torch.randn(2, 2)), Role.ADAPTER)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def names(model: nn.Module, group: dict[str, object]) -> list[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in group["params"]]  # type: ignore[attr-defined]


def test_every_trainable_parameter_is_in_the_right_group_once() -> None:
    model = Toy()
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    assert {name: names(model, group) for name, group in groups.items()} == {
        "dense": ["adapter", "embedding.weight", "linear.weight"],
        "dense_no_decay": ["scale", "norm.weight", "norm.bias", "linear.bias"],
        "cores": ["core_0", "core_1", "expert"],
        "cores_no_decay": ["expert_bias"],
    }
    rules = {name: (group["lr_factor"], group["weight_decay"]) for name, group in groups.items()}
    assert rules == {
        "dense": (1.0, 0.1),
        "dense_no_decay": (1.0, 0.0),
        "cores": (0.5, 0.01),
        "cores_no_decay": (0.5, 0.0),
    }


def test_order_is_that_of_the_names_and_empty_groups_are_left_out() -> None:
    assert [group["name"] for group in parameter_groups(Toy(), CONFIG)] == list(GROUP_NAMES)
    plain = nn.Linear(3, 3)
    groups = parameter_groups(plain, CONFIG)
    assert [group["name"] for group in groups] == ["dense", "dense_no_decay"]


def test_core_decay_follows_the_dense_one_where_absent_and_zero_stays_zero() -> None:
    def core_decay(value: float | None) -> float:
        config = AdamWConfig(weight_decay=0.3, core_weight_decay=value)
        groups = parameter_groups(Toy(), config)
        return next(g["weight_decay"] for g in groups if g["name"] == "cores")

    assert core_decay(None) == 0.3
    assert core_decay(0.0) == 0.0


def test_optimizer_takes_over_moments_and_starts_at_rate_zero() -> None:
    model = Toy()
    config = AdamWConfig(betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(model, config)
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in optimizer.param_groups)
    before = model.linear.weight.clone()
    (model.linear.weight.sum() + model.core_0.sum()).backward()
    optimizer.step()
    assert torch.equal(before, model.linear.weight)


def test_update_equals_adamw_by_hand() -> None:
    """First step of AdamW: w (1 - lr decay) - lr sign(g) for eps -> 0, group by group."""
    torch.manual_seed(0)
    model = Toy().double()
    for parameter in (model.core_0, model.core_1, model.expert, model.expert_bias):
        set_role(parameter, Role.CENTRAL)
    optimizer = build_optimizer(model, AdamWConfig(weight_decay=0.1, core_lr_factor=0.5, eps=1e-30))
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)
    lr = 1e-2
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = lr * (0.5 if name.startswith(("core", "expert")) else 1.0)
        decay = 0.1 if parameter.ndim > 1 else 0.0
        if parameter.grad is None:
            expected = old[name]
        else:
            expected = old[name] * (1 - rate * decay) - rate * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


def test_cpu_never_uses_the_fused_kernel() -> None:
    assert build_optimizer(Toy(), CONFIG).defaults["fused"] is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_uses_the_fused_kernel() -> None:
    model = nn.Linear(3, 3).cuda()
    optimizer = build_optimizer(model, CONFIG)
    assert optimizer.defaults["fused"] is True
    optimizer.param_groups[0]["lr"] = 0.1
    before = model.weight.detach().clone()
    model(torch.ones(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)
