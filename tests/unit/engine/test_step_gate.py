"""The gate in the optimizer's step: refusal, clipping, and central tensors that rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mpotrain.engine.central_mask import CentralMask
from mpotrain.engine.config import NO_MASK, CentralMaskConfig
from mpotrain.engine.fragment import Fragment
from mpotrain.engine.step_gate import StepGate, clip_coefficient

NAMES = ("a.central", "b.central")


class Setup:
    """Two central tensors in groups as the mask wants them, one other tensor, and their gate."""

    def __init__(self, config: CentralMaskConfig = NO_MASK, seed: int = 5) -> None:
        torch.manual_seed(0)
        self.tensors = {n: nn.Parameter(torch.randn(40)) for n in (*NAMES, "other")}
        groups: list[dict[str, Any]] = [{"params": [self.tensors["other"]]}]
        if config.granularity == "tensor":
            groups += [{"params": [self.tensors[n]], "central": [n]} for n in NAMES]
        else:
            groups.append({"params": [self.tensors[n] for n in NAMES], "central": list(NAMES)})
        self.optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
        self.mask = CentralMask(config, seed, groups)
        self.gate = StepGate(self.optimizer, self.mask, self._fragment)

    def _fragment(self, name: str) -> Fragment:
        tensor = self.tensors[name]
        return Fragment(0, tensor.numel(), tensor, 0)

    def update(self, step: int, *, allowed: bool = True, clip: float = 1.0) -> None:
        for tensor in self.tensors.values():
            tensor.grad = torch.ones_like(tensor)
        with self.gate.passing(allowed, step=step, clip=clip):
            self.optimizer.step()
        self.mask.count_update(step)

    def snapshot(self, name: str) -> list[torch.Tensor]:
        tensor = self.tensors[name]
        state = self.optimizer.state.get(tensor, {})
        return [tensor.detach().clone(), *(state[k].clone() for k in sorted(state))]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_gate_stops_exactly_the_update() -> None:
    setup = Setup()
    before = setup.snapshot("other")
    setup.update(0, allowed=False)
    assert same(setup.snapshot("other"), before)
    assert not setup.optimizer.state
    setup.update(0)
    assert not same(setup.snapshot("other"), before)
    setup.gate.remove()
    assert "step" not in vars(setup.optimizer)


def test_clipping_is_that_of_torch() -> None:
    gradient = torch.randn(50, dtype=torch.float64) * 3
    parameter = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], 0.7))
    assert torch.allclose(gradient * clip_coefficient(norm, 0.7), parameter.grad, rtol=1e-14)
    assert clip_coefficient(norm, None) == 1.0
    assert clip_coefficient(0.5, 0.7) == 1.0
    setup = Setup()
    setup.update(0, clip=0.25)
    assert float(setup.optimizer.state[setup.tensors["other"]]["exp_avg"][0]) == pytest.approx(
        0.1 * 0.25
    )


@pytest.mark.parametrize("granularity", ["step", "tensor"])
def test_resting_tensors_keep_value_moments_and_counter(granularity: Any) -> None:
    setup = Setup(CentralMaskConfig(probability=0.5, granularity=granularity))
    rested = dict.fromkeys(NAMES, 0)
    apart = 0
    for step in range(60):
        before = {name: setup.snapshot(name) for name in (*NAMES, "other")}
        setup.update(step)
        assert not same(setup.snapshot("other"), before["other"])
        resting = [setup.mask.rests(name, step) for name in NAMES]
        apart += resting[0] != resting[1]
        for name, rests in zip(NAMES, resting, strict=True):
            assert same(setup.snapshot(name), before[name]) == rests
            rested[name] += rests
    assert (apart > 0) == (granularity == "tensor")
    for name in NAMES:
        assert 15 <= rested[name] <= 45
        assert setup.mask.updates[name] == 60 - rested[name]
        state = setup.optimizer.state[setup.tensors[name]]
        assert float(state["step"]) == setup.mask.updates[name]


def test_elements_rest_one_by_one() -> None:
    setup = Setup(CentralMaskConfig(probability=0.5, granularity="element"))
    for step in range(4):
        before = setup.snapshot("a.central")
        setup.update(step)
        after = setup.snapshot("a.central")
        moved = after[0] != before[0]
        assert 5 < int(moved.sum()) < 35
        if step:
            for old, new in zip(before[1:3], after[1:3], strict=True):
                assert torch.equal(old != new, moved)
        else:
            assert torch.equal(after[1] != 0, moved)
    assert setup.mask.updates == {}


def test_certain_mask_freezes_and_impossible_mask_changes_nothing() -> None:
    frozen, plain, unmasked = (
        Setup(CentralMaskConfig(probability=1.0)),
        Setup(CentralMaskConfig(probability=0.0)),
        Setup(),
    )
    start = frozen.snapshot("a.central")
    for step in range(5):
        for setup in (frozen, plain, unmasked):
            setup.update(step)
    assert same(frozen.snapshot("a.central"), start)
    assert not same(frozen.snapshot("other"), [start[0]])
    for name in (*NAMES, "other"):
        assert same(plain.snapshot(name), unmasked.snapshot(name))


def test_draws_follow_probability_seed_step_and_tensor_alone() -> None:
    for probability in (0.1, 0.3, 0.7):
        config = CentralMaskConfig(probability=probability, granularity="tensor")
        mask = Setup(config).mask
        draws = [mask.rests("a.central", step) for step in range(4000)]
        # Five standard deviations of a binomial share.
        assert abs(sum(draws) / 4000 - probability) < 5 * (probability * 0.9 / 4000) ** 0.5
        assert draws == [Setup(config).mask.rests("a.central", s) for s in range(10)] + draws[10:]
        other = [mask.rests("b.central", step) for step in range(4000)]
        assert other != draws
        seeded = [Setup(config, seed=6).mask.rests("a.central", step) for step in range(200)]
        assert seeded != draws[:200]


def test_counters_come_back() -> None:
    config = CentralMaskConfig(probability=0.5, granularity="tensor")
    setup = Setup(config)
    for step in range(20):
        setup.update(step)
    fresh = Setup(config).mask
    fresh.load(dict(setup.mask.updates), 20)
    assert fresh.updates == setup.mask.updates
    for group in setup.optimizer.param_groups:
        names = group.get("central", [])
        wanted = setup.mask.updates[names[0]] if names else 20
        assert fresh.group_updates(group, 20) == wanted
    fresh.load(None, 7)
    assert set(fresh.updates.values()) == {7}
