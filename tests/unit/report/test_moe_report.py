"""The plan of runs with mixtures of experts."""

import json
from pathlib import Path

import pytest

from mpotrain.config import load_config
from mpotrain.report.sites import render_operations
from mpotrain.report.text import render
from mpotrain.report.weigh import PlanReport, weigh
from mpotrain.tensor.expert_plan import plan_experts
from mpotrain.tensor.plan import PROFILES

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"


def report(name: str, *overrides: str, world: int = 8) -> PlanReport:
    return weigh(load_config(RUNS / f"{name}.toml", list(overrides)), world)


def test_expert_sites_count_all_experts_and_their_dense_twins() -> None:
    plan = report("gpt2-small-mpoe8")
    sites = {site.family: site for site in plan.sites}
    assert {"c_fc", "c_proj"}.isdisjoint(sites)
    site = sites["expert_c_fc"]
    assert (site.key, site.copies, site.num_experts) == ("moe.c_fc", 12, 8)
    assert site.parameters == 12 * (2_359_296 + 8 * 184_720)
    assert site.dense_parameters == 12 * 8 * 768 * 3072
    assert plan.dense_num_parameters == report("gpt2-small-switch8").num_parameters
    assert plan.mixtures is not None
    assert (
        plan.mixtures.active_parameters
        == load_config(RUNS / "gpt2-small-mpoe8.toml").model.active_parameters()
    )
    assert plan.mixtures.expert_parameters == 12 * 8 * (2 * 184_720 + 3072 + 768)


@pytest.mark.parametrize("ranks", [1, 4])
def test_expert_sites_have_the_plan_that_their_layers_execute(ranks: int) -> None:
    torch = pytest.importorskip("torch")
    from mpotrain.nn.moe.experts import MPOExperts

    overrides = ("engine.device='cpu'", "model.moe.router.top_k=2", f"parallel.expert={ranks}")
    name = "gpt2-small-mpoe8-asymmetric"
    run = load_config(RUNS / f"{name}.toml", list(overrides))
    site = next(s for s in run.model.all_sites() if s.family == "expert_c_proj")
    local = 8 // ranks
    layer = MPOExperts(site.spec, site.choice, local, bias=False, std=0.02)  # type: ignore[arg-type]
    executed = layer.plan(2 * 2 * 512, torch.float32, torch.device("cpu"))
    shown = next(s for s in weigh(run, 8).sites if s.family == "expert_c_proj")
    assert shown.time_ratio == executed.ratio
    assert shown.kept_bytes == 12 * executed.saved_bytes
    assert shown.transient_bytes == executed.transient_bytes
    flops = executed.forward_flops + executed.backward_flops
    assert shown.flops_per_step == 12 * 8 * flops
    assert executed.summary in render_operations(run, "cpu")


def test_a_forced_plan_is_shown() -> None:
    factored = "model.moe.c_fc.plan='factored'"
    site = next(s for s in report("gpt2-small-mpoe8", factored).sites if s.family == "expert_c_fc")
    run = load_config(RUNS / "gpt2-small-mpoe8.toml", [factored])
    spec = next(s.spec for s in run.model.all_sites() if s.family == "expert_c_fc")
    assert spec is not None
    plan = plan_experts(spec, 8, 1024, "fp32", PROFILES["h200"], force="factored")
    assert site.time_ratio == plan.ratio
    assert site.plan.startswith("factored")


def test_dense_experts_execute_as_many_flops_as_a_dense_layer() -> None:
    plan = report("gpt2-small-switch8")
    dense = report("gpt2-small-dense")
    router = 6 * 12 * 768 * 8 * plan.tokens_per_step
    assert plan.executed_flops_per_step - dense.executed_flops_per_step == router
    two = report("gpt2-small-switch8", "model.moe.router.top_k=2")
    experts = 6 * 12 * 2 * 768 * 3072 * plan.tokens_per_step
    assert two.executed_flops_per_step - plan.executed_flops_per_step == experts


def test_recomputed_blocks_keep_one_plan_at_a_time() -> None:
    name = "gpt2-small-mpoe8-asymmetric"
    plain, again = report(name), report(name, "model.activation_checkpointing=true")
    assert plain.kept_by_plans == 12 * again.kept_by_plans > 0


def test_table_of_expert_parallelism_agrees_with_traffic_and_memory() -> None:
    for ranks in (1, 2, 4, 8):
        plan = report("gpt2-small-switch8", f"parallel.expert={ranks}")
        assert plan.problems == []
        assert plan.mixtures is not None
        assert plan.mixtures.least_traffic == 8
        chosen = next(x for x in plan.mixtures.layouts if x.ranks == ranks)
        assert chosen.state == plan.state.total
        assert chosen.tokens == plan.traffic.tokens
        others = plan.traffic.total - chosen.total
        assert others == pytest.approx(7 / 8 * 12 * plan.by_role["dense"], rel=1e-6)
        assert f"{'1 rank' if ranks == 1 else f'{ranks} ranks'} " in render(plan)
    assert report("gpt2-small-mpoe8-asymmetric").mixtures.least_traffic == 1  # type: ignore[union-attr]


def test_impossible_degrees_are_problems_and_not_crashes() -> None:
    for world in (1, 4):
        plan = report("gpt2-small-switch8", world=world)
        assert any("parallel.expert" in line for line in plan.problems)
        assert plan.traffic.tokens == 0


def test_json_and_text_tell_of_mixtures() -> None:
    plan = report("gpt2-small-mpoe8")
    data = json.loads(json.dumps(plan.to_json()))
    layouts = data["mixtures"]["layouts"]
    assert [x["ranks"] for x in layouts] == [1, 2, 4, 8]
    assert all(x["total"] == x["tokens"] + x["gradients"] + x["weights"] for x in layouts)
    text = render(plan)
    assert "mixtures          12, each of 8 experts, top-1" in text
    assert "parallel.expert=8 sends least" in text
    assert "active" in text
    dense = report("gpt2-small-dense")
    assert dense.to_json()["mixtures"] is None
    assert "active" not in render(dense)
    assert "tokens 0 B" not in render(dense)
