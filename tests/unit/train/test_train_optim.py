"""Parameter groups, and the AdamW update that follows from them."""

from typing import Literal

import pytest
import torch
from torch import nn

from mpotrain.engine.config import CentralMaskConfig
from mpotrain.nn.roles import Role, set_experts, set_role
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


class Mixture(nn.Module):
    """Two mixture sites, one of cores and one of dense matrices, before a plain operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = set_experts(set_role(nn.Parameter(torch.randn(3, 4)), Role.EXPERT), 3)
        self.left = set_experts(set_role(nn.Parameter(torch.randn(3, 1, 2)), Role.AUXILIARY), 3)
        self.thin = set_experts(set_role(nn.Parameter(torch.randn(3, 2)), Role.AUXILIARY), 3)
        self.shared = set_role(nn.Parameter(torch.randn(2, 2, 2, 2)), Role.CENTRAL)
        self.matrices = set_experts(set_role(nn.Parameter(torch.randn(3, 4, 4)), Role.EXPERT), 3)
        self.router = nn.Linear(4, 3)
        self.core_0 = set_role(nn.Parameter(torch.randn(1, 2, 2, 3)), Role.AUXILIARY)
        self.core_1 = set_role(nn.Parameter(torch.randn(3, 2, 2, 1)), Role.CENTRAL)


KEYS = {"name", "params", "lr_factor", "weight_decay"}


def names(model: nn.Module, group: dict[str, object]) -> list[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in group["params"]]  # type: ignore[attr-defined]


def test_every_trainable_parameter_is_in_the_right_group_once() -> None:
    model = Toy()
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    assert {name: names(model, group) for name, group in groups.items()} == {
        "dense": ["expert", "adapter", "embedding.weight", "linear.weight"],
        "dense_no_decay": ["expert_bias", "scale", "norm.weight", "norm.bias", "linear.bias"],
        "cores": ["core_0", "core_1"],
    }
    rules = {name: (group["lr_factor"], group["weight_decay"]) for name, group in groups.items()}
    assert rules == {
        "dense": (1.0, 0.1),
        "dense_no_decay": (1.0, 0.0),
        "cores": (0.5, 0.01),
    }
    assert all(set(group) == KEYS for group in groups.values())


def test_order_is_that_of_the_names_and_empty_groups_are_left_out() -> None:
    assert [group["name"] for group in parameter_groups(Toy(), CONFIG)] == list(GROUP_NAMES[:3])
    masked = parameter_groups(Mixture(), CONFIG, CentralMaskConfig(probability=0.5))
    found = [group["name"] for group in masked]
    assert found == [name for name in GROUP_NAMES if name in found]
    assert len(found) == len(GROUP_NAMES) - 1  # no core of an ordinary operator is a vector
    plain = nn.Linear(3, 3)
    groups = parameter_groups(plain, CONFIG)
    assert [group["name"] for group in groups] == ["dense", "dense_no_decay"]


def test_parameters_of_experts_stand_apart_and_their_biases_do_not_decay() -> None:
    model = Mixture()
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    assert {name: names(model, group) for name, group in groups.items()} == {
        "dense": ["router.weight"],
        "dense_no_decay": ["router.bias"],
        "cores": ["shared", "core_0", "core_1"],
        "expert_dense": ["matrices"],
        "expert_dense_no_decay": ["bias"],
        "expert_cores": ["left"],
        "expert_cores_no_decay": ["thin"],
    }
    rules = {name: (group["lr_factor"], group["weight_decay"]) for name, group in groups.items()}
    assert rules == {
        "dense": (1.0, 0.1),
        "dense_no_decay": (1.0, 0.0),
        "cores": (0.5, 0.01),
        "expert_dense": (1.0, 0.1),
        "expert_dense_no_decay": (1.0, 0.0),
        "expert_cores": (0.5, 0.01),
        "expert_cores_no_decay": (0.5, 0.0),
    }
    for name, group in groups.items():
        assert group.get("experts", False) is name.startswith("expert_")
        assert "central" not in group


@pytest.mark.parametrize("granularity", ["step", "element"])
def test_masked_central_tensors_are_one_group_with_their_names(
    granularity: Literal["step", "element"],
) -> None:
    model = Mixture()
    mask = CentralMaskConfig(probability=0.3, granularity=granularity)
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG, mask)}
    assert names(model, groups["central"]) == ["shared", "core_1"]
    assert groups["central"]["central"] == ["shared", "core_1"]
    assert (groups["central"]["lr_factor"], groups["central"]["weight_decay"]) == (0.5, 0.01)
    assert names(model, groups["cores"]) == ["core_0"]
    assert [name for name, group in groups.items() if "central" in group] == ["central"]


def test_draws_for_each_tensor_give_each_central_tensor_a_group() -> None:
    model = Mixture()
    mask = CentralMaskConfig(probability=1.0, granularity="tensor")
    groups = parameter_groups(model, CONFIG, mask)
    assert [group["name"] for group in groups] == [
        "dense",
        "dense_no_decay",
        "cores",
        "central:shared",
        "central:core_1",
        "expert_dense",
        "expert_dense_no_decay",
        "expert_cores",
        "expert_cores_no_decay",
    ]
    for group, name in zip(groups[3:5], ("shared", "core_1"), strict=True):
        assert names(model, group) == [name] == group["central"]
        assert (group["lr_factor"], group["weight_decay"]) == (0.5, 0.01)


@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
def test_no_mask_and_no_central_tensor_change_nothing(
    granularity: Literal["step", "tensor", "element"],
) -> None:
    off = CentralMaskConfig(probability=0.0, granularity=granularity)
    on = CentralMaskConfig(probability=0.5, granularity=granularity)
    plain = nn.Linear(3, 3)
    for model, mask in ((Mixture(), off), (plain, on)):
        groups = parameter_groups(model, CONFIG, mask)
        expected = parameter_groups(model, CONFIG)
        assert [group["name"] for group in groups] == [group["name"] for group in expected]
        assert all("central" not in group for group in groups)


def test_optimizer_keeps_the_marks_of_its_groups() -> None:
    optimizer = build_optimizer(Mixture(), CONFIG, CentralMaskConfig(probability=0.5))
    marks = {g["name"]: (g.get("experts"), g.get("central")) for g in optimizer.param_groups}
    assert marks["central"] == (None, ["shared", "core_1"])
    assert marks["expert_cores"] == (True, None)
    assert marks["dense"] == (None, None)


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
    set_experts(model.expert_bias, 3)
    mask = CentralMaskConfig(probability=0.5, granularity="tensor")
    config = AdamWConfig(weight_decay=0.1, core_lr_factor=0.5, eps=1e-30)
    optimizer = build_optimizer(model, config, mask)
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)
    lr = 1e-2
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = lr * (0.5 if name.startswith("core") else 1.0)
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
