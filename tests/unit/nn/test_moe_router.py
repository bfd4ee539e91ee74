"""Router: choice, gates, capacity, losses, selection biases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mpotrain.nn.moe.config import RouterConfig
from mpotrain.nn.moe.router import Router, Routing, keep_all_tokens


def router(
    num_experts: int = 6, hidden: int = 10, *, seed: int = 0, std: float = 0.8, **options: Any
) -> Router:
    generator = torch.Generator().manual_seed(seed)
    return Router(hidden, num_experts, RouterConfig(**options), std=std, generator=generator)


def tokens(count: int = 40, hidden: int = 10, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, hidden, generator=generator, dtype=torch.float64)


def route(module: Router, x: Tensor) -> Routing:
    return module.route(module(x))


def set_probabilities(module: Router, rows: list[list[float]]) -> Tensor:
    """Make the router give one-hot inputs n the probabilities in row n; return these inputs."""
    module.double()
    module.weight.data = torch.tensor(rows, dtype=torch.float64).log().t().contiguous()
    return torch.eye(len(rows), dtype=torch.float64)


def test_equal_probabilities_choose_the_first_experts() -> None:
    module = router(7, top_k=3)
    torch.nn.init.zeros_(module.weight)
    routing = route(module, tokens().float())
    assert torch.equal(routing.experts, torch.tensor([[0, 1, 2]]).expand(40, 3))
    x = set_probabilities(router_of := router(4, 2, top_k=2), [[0.1, 0.4, 0.1, 0.4]] * 2)
    assert route(router_of, x).experts.tolist() == [[1, 3], [1, 3]]


def test_choices_are_the_most_probable_ones_best_first() -> None:
    module = router(3, 3, top_k=2)
    x = set_probabilities(module, [[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]])
    routing = route(module, x)
    assert routing.experts.tolist() == [[1, 2], [0, 2], [2, 1]]
    wanted = torch.tensor([[5 / 8, 3 / 8], [6 / 9, 3 / 9], [7 / 9, 2 / 9]], dtype=torch.float64)
    torch.testing.assert_close(routing.gates, wanted)
    assert routing.kept is None


def test_gates_without_normalisation_are_probabilities() -> None:
    module = router(3, 1, top_k=2, normalise=False)
    routing = route(module, set_probabilities(module, [[0.2, 0.5, 0.3]]))
    torch.testing.assert_close(routing.gates.tolist(), [[0.5, 0.3]])


def test_straight_through_gate_is_one_with_the_gradient_of_log_p() -> None:
    module = router(top_k=1, gate="straight_through").double()
    x = tokens()
    routing = route(module, x)
    assert torch.equal(routing.gates, torch.ones(40, 1, dtype=torch.float64))
    (ours,) = torch.autograd.grad(routing.gates.sum(), module.weight)
    log_p = (x @ module.weight.t()).log_softmax(-1).gather(1, routing.experts)
    (wanted,) = torch.autograd.grad(log_p.sum(), module.weight)
    torch.testing.assert_close(ours, wanted)
    assert float(ours.abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_computed_in_fp32(dtype: torch.dtype) -> None:
    module = router(top_k=2, bias=True).to(dtype)
    x = tokens().to(dtype)
    routing = route(module, x)
    scores = x.float() @ module.weight.float().t()
    p, _ = scores.softmax(-1).sort(descending=True, stable=True)
    assert routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.gates, p[:, :2] / p[:, :2].sum(1, keepdim=True))
    assert routing.auxiliary_loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in routing.statistics.values())
    (routing.gates[:, 0].sum() + routing.auxiliary_loss).backward()
    assert module.weight.grad is not None
    assert module.bias is not None
    assert module.bias.grad is not None


def kept_by_loop(experts: list[list[int]], num_experts: int, capacity: int) -> list[list[bool]]:
    room = [capacity] * num_experts
    kept = [[False] * len(row) for row in experts]
    for c in range(len(experts[0])):
        for n, row in enumerate(experts):
            if room[row[c]] > 0:
                room[row[c]] -= 1
                kept[n][c] = True
    return kept


@pytest.mark.parametrize(("top_k", "factor"), [(1, 0.5), (1, 1.0), (2, 0.9), (3, 0.4), (3, 9.0)])
def test_capacity_keeps_first_choices_of_early_tokens(top_k: int, factor: float) -> None:
    module = router(top_k=top_k, capacity_factor=factor)
    routing = route(module, tokens().float())
    capacity = math.ceil(round(factor * top_k * 40, 6) / 6)
    wanted = kept_by_loop(routing.experts.tolist(), 6, capacity)
    assert routing.kept is not None
    assert routing.kept.tolist() == wanted
    assert float(routing.statistics["dropped"]) == sum(not k for row in wanted for k in row)
    assert float(routing.statistics["routed"]) == 40 * top_k
    assert (float(routing.statistics["dropped"]) > 0) == (factor < 9)
    assert float(routing.statistics["expert_tokens"].sum()) == 40 * top_k


def test_second_choices_wait_for_all_first_choices() -> None:
    module = router(2, 2, top_k=2, capacity_factor=0.5)
    # Capacity 1: expert 0 is the first choice of token 1 and the second choice of token 0.
    routing = route(module, set_probabilities(module, [[0.3, 0.7], [0.6, 0.4]]))
    assert routing.kept is not None
    assert routing.kept.tolist() == [[True, False], [True, False]]


def test_capacity_is_exact_in_decimals() -> None:
    module = router(1, capacity_factor=0.7)
    # 0.7 * 10 is 7, but 7.000000000000001 and so rounded up to 8 if floats were multiplied last.
    kept = route(module, tokens(10).float()).kept
    assert kept is not None
    assert int(kept.sum()) == 7
    kept = route(router(10, std=0.0, capacity_factor=1.1), tokens(100).float()).kept
    assert kept is not None
    assert int(kept.sum()) == 11
    assert math.ceil(1.1 * 100 / 10) == 12


def test_evaluation_has_its_own_capacity() -> None:
    module = router(std=0.0, capacity_factor=1.0, eval_capacity_factor=2.0)
    x = tokens(60).float()
    assert int(route(module, x).statistics["dropped"]) == 50
    assert int(route(module.eval(), x).statistics["dropped"]) == 40
    assert route(router(capacity_factor=1.0).eval(), x).kept is None


def test_jitter_multiplies_the_input_in_training_alone() -> None:
    module = router(jitter=0.3, top_k=2)
    x = tokens(500).float()
    torch.manual_seed(5)
    routing = route(module, x)
    torch.manual_seed(5)
    noise = torch.empty_like(x).uniform_(0.7, 1.3)
    assert float(noise.min()) < 0.705
    assert float(noise.max()) > 1.295
    without = router(top_k=2)
    assert torch.equal(routing.gates, route(without, x * noise).gates)
    assert not torch.equal(route(module, x).gates, routing.gates)
    assert torch.equal(route(module.eval(), x).gates, route(without, x).gates)


def test_balance_loss_is_that_of_the_switch_transformer() -> None:
    # Two tokens choose expert 0, one chooses expert 1; mean probabilities 0.4, 1.1 / 3, 0.7 / 3.
    module = router(3, 3, balance_loss=0.5)
    x = set_probabilities(module, [[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.1, 0.7, 0.2]])
    wanted = 3 * (2 / 3 * 1.2 / 3 + 1 / 3 * 1.1 / 3)
    routing = route(module, x)
    assert routing.auxiliary_loss.item() == pytest.approx(0.5 * wanted)
    assert float(routing.statistics["balance_loss"]) == pytest.approx(3 * wanted)
    assert routing.statistics["expert_tokens"].tolist() == [2, 1, 0]
    assert float(routing.statistics["tokens"]) == 3


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_one_for_even_loads_and_largest_for_one_expert(top_k: int) -> None:
    even = router(4, 4, top_k=top_k, balance_loss=1.0)
    rows = [[0.4 if e in (n, (n + 1) % 4) else 0.1 for e in range(4)] for n in range(4)]
    assert route(even, set_probabilities(even, rows)).auxiliary_loss.item() == pytest.approx(1.0)
    one = router(4, 1, top_k=top_k, balance_loss=1.0)
    rows = [[0.98, 0.01, 0.006, 0.004]]
    loss = route(one, set_probabilities(one, rows)).auxiliary_loss.item()
    assert loss == pytest.approx(4 * (0.98 if top_k == 1 else (0.98 + 0.01) / 2))


def test_losses_and_their_gradients_follow_the_formulas() -> None:
    module = router(top_k=2, balance_loss=0.3, z_loss=0.7, bias=True).double()
    x = tokens()
    routing = route(module, x)
    scores = x @ module.weight.t() + module.bias
    share = torch.tensor([float((routing.experts == e).sum()) / 80 for e in range(6)]).double()
    balance = 6 * (share * scores.softmax(-1).mean(0)).sum()
    z = (scores.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(routing.auxiliary_loss, 0.3 * balance + 0.7 * z)
    ours = torch.autograd.grad(routing.auxiliary_loss, list(module.parameters()))
    theirs = torch.autograd.grad(0.3 * balance + 0.7 * z, list(module.parameters()))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)
    assert float(routing.statistics["z_loss"]) == pytest.approx(40 * z.item(), rel=1e-6)
    p = scores.softmax(-1)
    entropy = -(p * p.log()).sum().item()
    assert float(routing.statistics["router_entropy"]) == pytest.approx(entropy, rel=1e-6)
    assert not any(value.requires_grad for value in routing.statistics.values())


def test_selection_biases_change_the_choice_and_not_the_gates() -> None:
    module = router(3, 1, balance_rate=0.25)
    x = set_probabilities(module, [[0.5, 0.3, 0.2]])
    assert route(module, x).experts.tolist() == [[0]]
    module.update_balance(torch.tensor([3.0, 0.0, 0.0]))
    assert module.balance is not None
    assert module.balance.tolist() == [-0.25, 0.25, 0.25]
    routing: Routing = route(module, x)
    assert routing.experts.tolist() == [[1]]
    torch.testing.assert_close(routing.gates.tolist(), [[0.3]])
    module.update_balance(torch.tensor([1, 1, 1]))
    assert module.balance.tolist() == [-0.25, 0.25, 0.25]
    with pytest.raises(ValueError, match="3 experts"):
        module.update_balance(torch.ones(4))


def test_improbable_experts_chosen_by_biases_have_finite_gates() -> None:
    for options in ({"gate": "straight_through"}, {"top_k": 2}):
        module = router(3, 1, balance_rate=1.0, **options)
        x = torch.ones(1, 1)
        module.weight.data = torch.tensor([[400.0], [0.0], [-1.0]])
        module.balance = torch.tensor([0.0, 5.0, 5.0])
        routing = route(module, x)
        assert routing.experts[0, 0] == 1
        assert bool(torch.isfinite(routing.gates).all())
        routing.gates[:, 0].sum().backward()
        assert bool(torch.isfinite(module.weight.grad).all())


def test_selection_biases_even_out_loads() -> None:
    module = router(8, bias=True, balance_rate=0.005, balance_loss=0.0)
    assert module.bias is not None
    module.bias.data[0] = 3.0
    ratios = []
    for step in range(300):
        loads = route(module, tokens(800, seed=step).float()).statistics["expert_tokens"]
        ratios.append(float(loads.max() / loads.mean()))
        module.update_balance(loads)
    assert ratios[0] > 4
    assert max(ratios[-10:]) < 1.5


def test_selection_biases_are_a_buffer_that_stays_in_fp32() -> None:
    assert "balance" not in router().state_dict()
    assert router().balance is None
    router().update_balance(torch.ones(6))
    module = router(balance_rate=0.001)
    assert dict(module.named_buffers()).keys() == {"balance"}
    assert module.balance is not None
    module.balance += 1.001
    module.bfloat16()
    assert module.weight.dtype == torch.bfloat16
    assert module.balance.dtype == torch.float32
    assert torch.equal(module.balance, torch.full((6,), 1.001))
    assert module.to("meta").balance.device.type == "meta"


def test_tokens_that_are_not_numbers_have_different_experts_too() -> None:
    """A broken micro-batch is for the engine's guard to refuse, not for an index error."""
    x = tokens(3).float()
    x[1] = math.nan
    routing = route(router(4, top_k=3, capacity_factor=1.0), x)
    assert all(len({*chosen}) == 3 and max(chosen) < 4 for chosen in routing.experts.tolist())
    assert bool(torch.isnan(routing.gates).any(1).equal(torch.tensor([False, True, False])))


def test_start_values_follow_the_generator() -> None:
    assert torch.equal(router(seed=3).weight, router(seed=3).weight)
    assert not torch.equal(router(seed=3).weight, router(seed=4).weight)
    assert router(64, 256, std=0.02).weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_keeps_all_switches_dropping_off() -> None:
    module = router(2, 2, capacity_factor=0.5, eval_capacity_factor=0.5).eval()
    x = tokens(10, 2).float()
    assert int(route(module, x).statistics["dropped"]) > 0
    keep_all_tokens(torch.nn.ModuleList([module]))
    assert int(route(module, x).statistics["dropped"]) == 0
