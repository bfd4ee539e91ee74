"""Experts spread over ranks: every gradient equals that of one process, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed import toy_model as toy
from distributed.engines import (
    CPU_WORLD,
    State,
    assert_same_steps,
    largest_difference,
    same_bits,
    whole_state,
    zero,
)
from distributed.mixture_model import (
    ASYMMETRIC,
    CLIP,
    NUM_EXPERTS,
    TOP_2,
    engine_of,
    microbatches,
    model_config,
    run_steps,
)

from mpotrain.engine.base import StepResult
from mpotrain.engine.config import DeepSpeedConfig, LocalConfig
from mpotrain.errors import ParallelError
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.nn.moe.config import MPOExpertSite, RouterConfig
from mpotrain.nn.roles import Role, role_of
from mpotrain.parallel.ranks import World
from mpotrain.start import spectra_metrics

LOCAL = LocalConfig(device="cpu")
STEPS = 5
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]
FIVE_CORES_BACK = MPOExpertSite(
    start="independent",
    in_modes=(2, 2, 2, 2, 2),
    out_modes=(2, 2, 2, 2, 1),
)
Change = Callable[[GPT2, torch.optim.Optimizer | None], None]


def no_change(model: GPT2, optimizer: torch.optim.Optimizer | None) -> None:
    """Leave the model as it is."""


NO_CHANGE = no_change


def train(
    world: World,
    config: DeepSpeedConfig | LocalConfig,
    model: GPT2Config,
    expert_ranks: int = 1,
    change: Change = NO_CHANGE,
) -> tuple[list[StepResult], State, Any]:
    engine = engine_of(world, config, model, expert_ranks=expert_ranks, change=change)
    results = run_steps(engine, 0, STEPS)
    # Ranks have different numbers of held-out batches: exchanges must not wait for ever.
    held = engine.evaluate([toy.batch_of(range(900, 903))] if world.rank == 0 else [])
    state = whole_state(engine)
    engine.close()
    return results, state, held


def assert_equal_to_local(
    outcomes: list[Any], model: GPT2Config, change: Change = NO_CHANGE
) -> Any:
    wanted, wanted_state, wanted_held = train(CPU_WORLD, LOCAL, model, change=change)
    for results, state, held in outcomes:
        assert_same_steps(results, wanted, 1e-5)
        assert largest_difference(state, wanted_state) < 1e-5
        assert held.loss_sum == pytest.approx(wanted_held.loss_sum, rel=1e-5)
        for one, other in zip(results, wanted, strict=True):
            for name in ("expert_tokens", "dropped"):
                assert torch.equal(one.statistics[name], other.statistics[name])
    assert all(same_bits(state, outcomes[0][1]) for _, state, _ in outcomes)
    return wanted


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("world", "expert_ranks"), LAYOUTS)
def test_every_layout_equals_one_process(
    run_ranks: Any, world: int, expert_ranks: int, stage: int
) -> None:
    model = model_config()
    wanted = assert_equal_to_local(run_ranks(world)(train, zero(stage), model, expert_ranks), model)
    assert any(result.grad_norm > CLIP for result in wanted)
    assert {"dense", "central", "auxiliary", "expert"} <= (wanted[0].grad_norm_by_role or {}).keys()


@pytest.mark.parametrize(
    ("config", "expert_ranks"),
    [(zero(0), 1), (zero(3), 1), (zero(1, offload_optimizer=True), 2), (zero(2), 2)],
)
def test_two_experts_with_drops_in_other_stages(
    run_ranks: Any, config: DeepSpeedConfig, expert_ranks: int
) -> None:
    model = model_config(TOP_2, ASYMMETRIC, FIVE_CORES_BACK, activation_checkpointing=True)
    wanted = assert_equal_to_local(run_ranks(2)(train, config, model, expert_ranks), model)
    assert float(wanted[0].statistics["dropped"].sum()) > 0


def to_first_expert(model: GPT2, optimizer: torch.optim.Optimizer | None) -> None:
    """Make all scores equal, so that every token chooses expert 0 and three ranks have none."""
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.data.zero_()


def test_all_tokens_to_one_expert(run_ranks: Any) -> None:
    model = model_config(RouterConfig(balance_loss=0.0))
    outcomes = run_ranks(4)(train, zero(1), model, 4, to_first_expert)
    wanted = assert_equal_to_local(outcomes, model, to_first_expert)
    loads = wanted[0].statistics["expert_tokens"]
    assert torch.equal(loads[:, 1:], torch.zeros_like(loads[:, 1:]))
    assert float(loads[:, 0].min()) > 0


def central_as_expert(model: GPT2, optimizer: torch.optim.Optimizer | None) -> None:
    """Tell DeepSpeed the wrong thing: to reduce central tensors over ranks with equal experts."""
    for parameter in model.parameters():
        if role_of(parameter) is Role.CENTRAL:
            parameter.allreduce, parameter.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
    if optimizer is not None:
        cores = next(g for g in optimizer.param_groups if g["name"] == "cores")
        central = [p for p in cores["params"] if role_of(p) is Role.CENTRAL]
        cores["experts"] = True
        assert len(central) == len(cores["params"])


def test_central_tensor_reduced_as_an_expert_is_caught(run_ranks: Any) -> None:
    model = model_config()
    _, right, _ = train(CPU_WORLD, LOCAL, model)
    outcomes = run_ranks(2)(train, zero(1), model, 2, central_as_expert)
    name = "blocks.0.ffn.c_fc.central"
    wrong = outcomes[0][1][name]["exp_avg"]
    assert float((wrong - right[name]["exp_avg"]).abs().max()) > 1e-2 * float(
        right[name]["exp_avg"].abs().max()
    )
    with pytest.raises(AssertionError):
        assert_equal_to_local(outcomes, model)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("world", "expert_ranks"), [(2, 2), (4, 2)])
def test_bf16_follows_local_bf16(run_ranks: Any, world: int, expert_ranks: int, stage: int) -> None:
    """In the larger world two ranks hold the same experts and reduce their gradients in bf16."""
    model = model_config(RouterConfig())
    wanted, _, _ = train(CPU_WORLD, LocalConfig(device="cpu", dtype="bf16"), model)
    roles = {"dense", "central", "auxiliary", "expert"}
    assert all((wanted[0].grad_norm_by_role or {})[role] > 0 for role in roles)
    outcomes = run_ranks(world)(train, zero(stage, dtype="bf16"), model, expert_ranks)
    for results, _, _ in outcomes:
        # From equal weights: a factor or a missing sum in one kind of group would show here.
        assert results[0].grad_norm_by_role == pytest.approx(wanted[0].grad_norm_by_role, rel=1e-2)
        for one, other in zip(results, wanted, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-2)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=5e-2)
    assert all(same_bits(state, outcomes[0][1]) for _, state, _ in outcomes)


def refuse_in_the_middle(world: World, config: DeepSpeedConfig) -> tuple[State, State, State]:
    engine = engine_of(world, config, model_config(), expert_ranks=2)
    run_steps(engine, 0, 2)
    before = whole_state(engine)
    result = engine.step(microbatches(2, world), lr=1e-2, step=2, guard=lambda loss, norm: "no")
    assert result.skipped
    after = whole_state(engine)
    run_steps(engine, 3, 4)
    later = whole_state(engine)
    engine.close()
    return before, after, later


@pytest.mark.parametrize("stage", [1, 2])
def test_a_refused_step_changes_no_expert(run_ranks: Any, stage: int) -> None:
    for before, after, later in run_ranks(2)(refuse_in_the_middle, zero(stage)):
        assert same_bits(before, after)
        assert not same_bits(later, after)


def hold(world: World) -> list[tuple[str, int, int]]:
    engine = engine_of(world, zero(1), model_config(), expert_ranks=2)
    found = [
        (name, parameter.shape[0], parameter.untyped_storage().data_ptr())
        for name, parameter in engine.model.named_parameters()
        if "auxiliaries.0" in name or name.endswith("ffn.c_fc.central")
    ]
    engine.close()
    return found


def test_a_rank_holds_its_own_experts_and_the_central_tensor(run_ranks: Any) -> None:
    for found in run_ranks(2)(hold):
        sizes = {name: rows for name, rows, _ in found}
        assert sizes["blocks.0.ffn.c_fc.auxiliaries.0"] == NUM_EXPERTS // 2
        # One storage for the one central tensor of a mixture's matrix.
        assert sum(name == "blocks.0.ffn.c_fc.central" for name, _, _ in found) == 1


def build_with(world: World, expert_ranks: int) -> str:
    try:
        engine_of(world, zero(1), model_config(), expert_ranks=expert_ranks)
    except ParallelError as error:
        return str(error)
    return ""


def test_degrees_that_do_not_divide_are_refused(run_ranks: Any) -> None:
    assert "does not divide the world of 2" in run_ranks(2)(build_with, 3)[0]
    assert "does not divide the 4 experts of blocks.0" in run_ranks(3)(build_with, 3)[0]


def look_at_whole_experts(world: World, expert_ranks: int) -> tuple[State, dict[str, Any], float]:
    """Read all weights, their spectra, and on rank 0 alone the loss of a batch."""
    engine = engine_of(world, zero(1), model_config(), expert_ranks=expert_ranks)
    # Adam takes the first steps of a tiny gradient by its sign, rounding included: not too early.
    run_steps(engine, 0, 4)
    loss = 0.0
    with engine.full_parameters():
        weights = {n: {"weight": p.detach().clone()} for n, p in engine.model.named_parameters()}
        spectra = spectra_metrics(engine.model)
        if world.is_main:
            engine.model.eval()
            with torch.no_grad():
                loss = float(engine.model(toy.batch_of(range(900, 903))).loss_sum)
            engine.model.train()
    run_steps(engine, 4, 5)
    after = whole_state(engine)
    engine.close()
    weights["after"] = {name: state["weight"] for name, state in after.items()}
    return weights, spectra, loss


def test_whole_experts_can_be_read_and_used_by_one_rank(run_ranks: Any) -> None:
    spread = run_ranks(2)(look_at_whole_experts, 2)
    together = run_ranks(2)(look_at_whole_experts, 1)
    for (weights, spectra, _), (wanted, wanted_spectra, _) in zip(spread, together, strict=True):
        assert largest_difference(weights, wanted) < 1e-5
        assert spectra.keys() == wanted_spectra.keys()
        for kind, values in wanted_spectra.items():
            assert spectra[kind] == pytest.approx(values, rel=1e-4), kind
        assert min(spectra["expert_spread"].values()) > 0.5
    assert spread[0][2] == pytest.approx(together[0][2], rel=1e-5)
