"""The plan of encoders: what layers execute, with adapters and shared blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpotrain.config import load_config
from mpotrain.report.weigh import PlanReport, weigh

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"
RECOMPUTED = "model.activation_checkpointing=true"


def report(name: str, *overrides: str) -> PlanReport:
    return weigh(load_config(RUNS / f"{name}.toml", list(overrides)))


@pytest.mark.parametrize(("overrides", "passes"), [((), 6), ((RECOMPUTED,), 8)])
def test_adapters_are_executed_and_recomputed(overrides: tuple[str, ...], passes: int) -> None:
    with_adapters, bare = report("mpobert-12", *overrides), report("mpobert-12-bare", *overrides)
    weights = 12 * 4 * 8 * (768 + 768)
    assert with_adapters.num_parameters - bare.num_parameters == weights
    executed = with_adapters.executed_flops_per_step - bare.executed_flops_per_step
    assert executed == pytest.approx(passes * weights * bare.tokens_per_step, rel=1e-6)
    model = with_adapters.model_flops_per_token - bare.model_flops_per_token
    assert model == pytest.approx(6 * weights, abs=1)  # rounded down in both


def test_activations_of_adapters_are_counted() -> None:
    with_adapters, bare = report("mpobert-12"), report("mpobert-12-bare")
    run = load_config(RUNS / "mpobert-12.toml")
    width = {"fp32": 4, "bf16": 2}[run.engine.dtype]
    tokens = run.train.micro_batch_size * run.sample_lengths().inputs
    added = with_adapters.activations.blocks - bare.activations.blocks
    assert added == 12 * tokens * 4 * 8 * width


@pytest.mark.parametrize("name", ["albert-base", "bert-base"])
def test_dense_encoders_execute_what_the_model_counts(name: str) -> None:
    """Blocks that all layers share are executed once for each layer."""
    plan = report(name)
    wanted = plan.model_flops_per_token * plan.tokens_per_step
    assert plan.executed_flops_per_step == pytest.approx(wanted, rel=1e-6)
