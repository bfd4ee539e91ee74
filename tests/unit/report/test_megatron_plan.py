"""Plans of runs cut over a grid of ranks, by hand."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mpotrain.config import load_config
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.report.grid import GridReport
from mpotrain.report.text import render
from mpotrain.report.weigh import PlanReport, weigh

ROOT = Path(__file__).resolve().parents[3]
RUNS = ROOT / "configs" / "runs"
HIDDEN, FFN, HEADS, LAYERS, VOCABULARY, POSITIONS = 768, 3072, 12, 12, 50257, 1024
TOKENS = 2 * 512
"""Of a micro-batch of GPT-2 small."""


def plan(name: str, world: int, engine: dict[str, Any], **parallel: Any) -> PlanReport:
    run = load_config(RUNS / f"{name}.toml")
    return weigh(
        replace(run, engine=MegatronConfig(**engine), parallel=ParallelConfig(**parallel)), world
    )


def grid_of(report: PlanReport) -> GridReport:
    assert report.grid is not None
    return report.grid


def ring(ranks: int, nbytes: float) -> float:
    return (ranks - 1) / ranks * nbytes


def block(tp: int) -> int:
    """Elements of a dense block of GPT-2 small on one of tp ranks."""
    cut = HIDDEN * 3 * HIDDEN + 3 * HIDDEN  # queries, keys, values
    cut += HIDDEN * HIDDEN + HIDDEN * FFN + FFN + FFN * HIDDEN
    return cut // tp + 2 * HIDDEN + 4 * HIDDEN  # biases behind the cut, two norms


def test_state_of_both_stages() -> None:
    report = plan("gpt2-small-dense", 8, {"dtype": "bf16"}, tensor=2, pipeline=2, sequence=True)
    rows = 25129 * HIDDEN  # half of the vocabulary, filled up
    held = [6 * block(2) + rows + POSITIONS * HIDDEN, 6 * block(2) + rows + 2 * HIDDEN]
    stages = grid_of(report).stages
    assert [stage.parameters for stage in stages] == held
    for stage, count in zip(stages, held, strict=True):
        assert stage.state.weights == 2 * count
        assert stage.state.gradients == 4 * count
        # Two data-parallel ranks share masters and moments.
        assert stage.state.masters == 4 * -(-count // 2)
        assert stage.state.moments == 8 * -(-count // 2)
        assert stage.state.cache == 0
    # The matrix of tokens has a copy on the other stage: its gradient is sent in one message.
    assert stages[0].state.buffers == 4 * rows
    alone = plan("gpt2-small-dense", 8, {"distributed_optimizer": False}, tensor=2, pipeline=2)
    state = grid_of(alone).stages[1].state
    assert (state.weights, state.masters, state.moments) == (4 * held[1], 0, 8 * held[1])


def test_context_ranks_split_the_optimizer_too() -> None:
    report = plan("gpt2-small-dense", 8, {}, context=4)
    stage = grid_of(report).stages[0]
    assert stage.state.moments == 8 * -(-stage.parameters // 8)


@pytest.mark.parametrize(("tp", "sequence"), [(1, False), (2, False), (2, True)])
def test_activations_of_stages_under_way(tp: int, sequence: bool) -> None:
    report = plan("gpt2-small-dense", 4 * tp, {}, tensor=tp, pipeline=4, sequence=sequence)
    stream = 2 * (4 * HIDDEN + 8) + 2 * HIDDEN  # both norms, two dropout masks
    read = 4 * 2 * HIDDEN  # inputs of the first and the third matrix
    inner = 4 * (5 * HIDDEN + 2 * FFN)  # q k v, twice the result of attention; before, after GELU
    token = (stream + read) / (tp if sequence else 1) + inner / tp
    stages = grid_of(report).stages
    assert [stage.passes for stage in stages] == [4, 3, 2, 1]
    for stage in stages:
        assert stage.activations.blocks == round(stage.passes * TOKENS * 3 * token)
        assert stage.chunks == [(3 * stage.stage, 3 * stage.stage + 2)]
    assert [stage.activations.output for stage in stages[:3]] == [0, 0, 0]
    scores = -(-VOCABULARY // tp) * (4 + 8)
    assert stages[3].activations.output == TOKENS * (scores + HIDDEN * 8)


def test_uncut_activations_are_those_of_other_engines() -> None:
    cut = plan("gpt2-small-mpoe8", 4, {})
    assert cut.activations == weigh(load_config(RUNS / "gpt2-small-mpoe8.toml"), 4).activations


def test_context_ranks_hold_the_keys_of_all_positions() -> None:
    one, two = (grid_of(plan("gpt2-small-dense", 2, {}, context=cp)).stages[0] for cp in (1, 2))
    keys = TOKENS * LAYERS * 4 * 2 * HIDDEN
    assert two.activations.blocks == (one.activations.blocks - keys) // 2 + keys
    assert two.activations.output == one.activations.output // 2


def test_interleaved_stages() -> None:
    degrees = {"pipeline": 2, "virtual_pipeline": 3}
    report = plan("gpt2-small-dense", 2, {}, **degrees)
    stages = grid_of(report).stages
    assert [stage.chunks for stage in stages] == [
        [(0, 1), (4, 5), (8, 9)],
        [(2, 3), (6, 7), (10, 11)],
    ]
    # Before the first backward pass: 2 passes for each stage behind, 2 chunks of 2 micro-batches,
    # and the one that comes back first.
    assert [stage.passes for stage in stages] == [2 + 4 + 1, 4 + 1]
    one = grid_of(plan("gpt2-small-dense", 1, {})).stages[0].activations.blocks
    assert stages[0].activations.blocks == 7 * (one // LAYERS) * 2
    # Each chunk but the last sends on, each but the first sends back; 8 micro-batches.
    assert [stage.traffic.pipeline for stage in stages] == [8 * 5 * TOKENS * HIDDEN * 4] * 2


def test_recomputed_blocks_keep_their_inputs() -> None:
    run = load_config(RUNS / "gpt2-small-dense.toml", ["model.activation_checkpointing=true"])
    run = replace(run, engine=MegatronConfig(), parallel=ParallelConfig(pipeline=2))
    plain = grid_of(plan("gpt2-small-dense", 2, {}, pipeline=2)).stages
    for stage, whole in zip(grid_of(weigh(run, 2)).stages, plain, strict=True):
        one = whole.activations.blocks // (whole.passes * 6)
        inputs = stage.passes * 6 * TOKENS * HIDDEN * 4
        assert stage.activations.blocks == inputs + one


def traffic(name: str, world: int, engine: dict[str, Any], **parallel: Any) -> dict[str, int]:
    report = plan(name, world, engine, **parallel)
    return asdict(grid_of(report).stages[0].traffic)


def test_traffic_of_tensor_parallel_ranks() -> None:
    sent = traffic("gpt2-small-dense", 2, {}, tensor=2)
    message = TOKENS * HIDDEN * 4
    # A layer all-reduces twice forward and twice backward, the ends once each, and the loss three
    # numbers for each token; 8 micro-batches.
    each = 4 * LAYERS * message + 2 * message + 3 * TOKENS * 4
    assert sent == dict.fromkeys(sent, 0) | {"tensor": 8 * 2 * ring(2, each)}


def test_traffic_of_split_positions() -> None:
    sent = traffic("gpt2-small-dense", 2, {}, tensor=2, sequence=True)
    message = TOKENS * HIDDEN * 4
    # Forward: gather, scatter, twice; backward likewise, and two gathers for gradients of weights.
    layers = LAYERS * 10 * ring(2, message)
    ends = 2 * ring(2, message) + ring(2, message)  # the embedding, and its gradient gathered
    ends += ring(2, message) + 2 * ring(2, message) + 2 * ring(2, 3 * TOKENS * 4)
    norms = 2 * (2 * LAYERS + 1) * HIDDEN + 2 * HIDDEN * LAYERS  # and biases behind cut matrices
    assert sent["tensor"] == 8 * (layers + ends)
    assert sent["partial"] == 2 * ring(2, 4 * norms)


def test_traffic_of_data_and_context_parallel_ranks() -> None:
    sent = traffic("gpt2-small-dense", 8, {"dtype": "bf16"}, context=2)
    count = 124_439_808
    assert sent["gradients"] == ring(8, 4 * count)
    assert sent["weights"] == ring(8, 2 * count)
    # Keys and values forward, their gradients backward; 2 micro-batches on each of 4 ranks.
    assert sent["context"] == 2 * LAYERS * 2 * ring(2, TOKENS * 2 * HIDDEN * 2)
    whole = traffic("gpt2-small-dense", 8, {"distributed_optimizer": False}, context=2)
    assert (whole["gradients"], whole["weights"]) == (2 * ring(8, 4 * count), 0)


def test_traffic_between_stages_and_of_copies() -> None:
    report = plan("mpobert-48-megatron", 8, {"dtype": "bf16", "distributed_optimizer": False},
                  pipeline=4)  # fmt: skip
    stages = grid_of(report).stages
    message = 8 * 512 * 1024 * 2
    per_rank = 4096 // 8 // 2
    assert [s.traffic.pipeline for s in stages] == [per_rank * n * message for n in (1, 2, 2, 1)]
    central = 4 * (256 * 4 * 4 * 256) + 2 * (256 * 4 * 8 * 512)
    embedding = 30000 * 128
    everywhere = 2 * ring(4, 4 * central)
    assert [s.traffic.copies for s in stages] == [
        round(everywhere + ends) for ends in (4 * embedding, 0, 0, 4 * embedding)
    ]


def expert_block(ep: int) -> tuple[int, int]:
    """Elements of one matrix's auxiliaries and biases on a rank, and of its central tensor."""
    return 8 // ep * 2 * 184_720 + 8 // ep * (FFN + HIDDEN), 2 * 2_359_296


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts(ep: int) -> None:
    degrees = {"tensor": 2, "sequence": True, "expert": ep}
    report = plan("gpt2-small-mpoe8", 8, {}, **degrees)
    stage = grid_of(report).stages[0]
    experts, central = (LAYERS * count for count in expert_block(ep))
    attention = 2 * HIDDEN * HIDDEN + 3 * HIDDEN // 2 + HIDDEN + 4 * HIDDEN
    dense = LAYERS * (attention + HIDDEN * 8) + 25129 * HIDDEN + POSITIONS * HIDDEN + 2 * HIDDEN
    assert stage.parameters == experts + central + dense
    # Experts are on 8 / ep ranks, everything else on 4 data-parallel ones.
    same = 8 // ep
    updated = -(-(central + dense) // 4) + -(-experts // same)
    assert stage.state.moments == 8 * updated
    assert stage.traffic.gradients == round(
        ring(4, 4 * (central + dense)) + ring(same, 4 * experts)
    )
    # Half of the tokens of each of 2 micro-batches: forward there and back, backward likewise, a
    # factor of 4 bytes along with each row.
    row = 2 * HIDDEN * 4 + 4
    assert stage.traffic.tokens == round(2 * LAYERS * 2 * ring(ep, TOKENS // 2 * row))
    mixtures = report.mixtures
    assert mixtures is not None
    own = next(layout for layout in mixtures.layouts if layout.ranks == ep)
    assert (own.tokens, own.local_experts) == (stage.traffic.tokens, 8 // ep)
    assert own.gradients == round(ring(same, 4 * experts))
    assert own.state == stage.state.total
    assert [layout.ranks for layout in mixtures.layouts] == [1, 2, 4, 8]


def test_experts_that_ranks_share() -> None:
    shared = {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}
    report = plan("gpt2-small-mpoe8", 8, {}, **shared)
    cuts = {cut.family: cut for cut in grid_of(report).cuts}
    cut = cuts["expert_c_fc"]
    assert (cut.side, cut.features, cut.ranks, cut.period) == ("out", FFN, 2, 192)
    assert (cut.core, cut.mode) == (2, 8)  # of 4 x 4 x 8 x 6 x 4
    # Rows are gathered from the other rank of the pair, and results scattered.
    row, passed = 2 * HIDDEN * 4 + 4, TOKENS // 2
    sent = grid_of(report).stages[0].traffic.tokens
    assert sent == round(2 * LAYERS * 2 * (passed / 2 + passed) * row)
    alone = plan("gpt2-small-mpoe8", 8, {}, tensor=2, sequence=True, expert=2)
    # Central tensors are halved: they are what is cut.
    fewer = grid_of(alone).stages[0].parameters - grid_of(report).stages[0].parameters
    biases = LAYERS * 4 * FFN // 2
    assert fewer == LAYERS * 2 * 2_359_296 // 2 + biases


def test_cached_matrices() -> None:
    report = plan("gpt2-small-ttm64", 2, {"dtype": "bf16", "cache_weights": True}, tensor=2)
    assert report.state.cache == LAYERS * 2 * HIDDEN * FFN // 2 * (2 + 4)
    sites = {site.family: site for site in report.sites}
    assert sites["c_fc"].plan == "W rebuilt once per step"
    often = {s.family: s for s in plan("gpt2-small-ttm64", 2, {"dtype": "bf16"}, tensor=2).sites}
    assert sites["c_fc"].flops_per_step < often["c_fc"].flops_per_step
    dense = 6 * LAYERS * HIDDEN * FFN * 8 * TOKENS
    assert sites["c_fc"].flops_per_step > dense
    assert sites["c_fc"].time_ratio < often["c_fc"].time_ratio
    assert sites["qkv"].plan == "dense"


def test_shared_blocks_have_one_cached_matrix() -> None:
    run = load_config(RUNS / "mpobert-12.toml", ['model.sharing={scope="all"}'])
    engine = MegatronConfig(cache_weights=True, distributed_optimizer=False)
    report = weigh(replace(run, engine=engine, parallel=ParallelConfig()), 1)
    assert report.state.cache == (4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN) * 8


def test_ranks_together_execute_what_one_does() -> None:
    one = plan("gpt2-small-dense", 1, {})
    for degrees in ({"tensor": 4}, {"tensor": 2, "sequence": True, "context": 2}, {"pipeline": 4}):
        cut = plan("gpt2-small-dense", 4, {}, **degrees)
        assert cut.executed_flops_per_step == pytest.approx(one.executed_flops_per_step, rel=1e-12)
        assert cut.num_parameters == one.num_parameters


def test_plans_are_those_of_the_ranks_parts() -> None:
    pytest.importorskip("torch")
    from mpotrain.engine.megatron.feature_cuts import RankPart
    from mpotrain.engine.megatron.matrices import RankSide, _mode_cut
    from mpotrain.engine.megatron.sources import LinearSource
    from mpotrain.nn.config import site_plan
    from mpotrain.tensor.plan import PROFILES

    run = load_config(RUNS / "gpt2-small-ttm64.toml")
    report = plan("gpt2-small-ttm64", 2, {}, tensor=2)
    shown = next(site for site in report.sites if site.family == "c_proj")
    site = next(site for site in run.model.all_sites() if site.family == "c_proj")
    period = next(cut.period for cut in grid_of(report).cuts if cut.family == "c_proj")
    source = LinearSource(None, site, period)  # type: ignore[arg-type]
    rank = RankSide("in", 2, 0)
    assert site.spec is not None
    part = RankPart(2, "in", _mode_cut(source, site.spec, rank)).spec(site.spec)
    executed = site_plan(site.choice, part, TOKENS, "fp32", PROFILES[report.device])  # type: ignore[arg-type]
    assert shown.time_ratio == executed.ratio
    assert shown.transient_bytes == executed.transient_bytes
    flops = executed.forward_flops + executed.backward_flops
    assert shown.flops_per_step == LAYERS * 8 * 2 * flops


def test_totals_and_json() -> None:
    report = weigh(load_config(RUNS / "gpt2-small-mpoe8-megatron.toml"), 8)
    data = json.loads(json.dumps(report.to_json()))
    grid = grid_of(report)
    fullest, busiest = grid.stages[grid.fullest], grid.stages[grid.busiest]
    assert (
        data["traffic"]["total"] == busiest.traffic.total == sum(asdict(busiest.traffic).values())
    )
    assert report.memory_per_rank == fullest.memory + report.transient
    assert data["grid"]["stages"][0]["memory"] == grid.stages[0].memory
    assert data["grid"]["grid"]["expert_data"] == 2
    assert len(data["grid"]["ranks"]) == 8
    assert data["grid"]["ranks"][5] == {
        "tensor": 1, "context": 0, "data": 2, "pipeline": 0, "expert_tensor": 0, "expert": 1,
        "expert_data": 1,
    }  # fmt: skip
    other = weigh(load_config(RUNS / "gpt2-small-mpoe8.toml"), 8).to_json()
    assert other["grid"] is None


def test_text() -> None:
    text = render(weigh(load_config(RUNS / "gpt2-medium-ttm72-megatron.toml"), 8))
    assert "8 = 2 tensor x 1 context x 2 data x 2 pipeline" in text
    assert "pipeline        rank 0 with 0 4" in text
    assert "cut mode 16 of core 2 over 2 ranks (out features in turns of 256): c_fc\n" in text
    assert "cut mode 16 of core 2 over 2 ranks (in features in turns of 256): c_proj\n" in text
    assert "cut features over 2 ranks (out features in turns of 1024): qkv\n" in text
    assert "22 micro-batch(es) on each data-parallel rank" in text
    assert "expert" not in text.partition("ranks   ")[2].partition("step  ")[0]
    assert "copies on other stages" in text
    assert "no problems found" in text
    # One line for each rank, up to a point.
    assert [line.split()[:3] for line in text.splitlines() if line.startswith("       7 ")] == [
        ["7", "1", "1"]
    ]
    large = plan("gpt2-small-dense", 128, {}, tensor=4, pipeline=4)
    assert "rank  tensor" not in render(large)
    assert "tensor          rank 0 with 0 1 2 3" in render(large)
    assert "data            rank 0 with 0 4 8 12 16 20 24 28" in render(large)


def test_a_world_that_the_degrees_do_not_divide() -> None:
    report = plan("gpt2-small-dense", 6, {}, tensor=4)
    assert report.grid is None
    assert any(line.startswith("parallel.tensor: tensor 4 x") for line in report.problems)
    assert any("do not divide the world" in note for note in report.notes)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mpotrain.config import load_config\n"
        "from mpotrain.report.text import render\n"
        "from mpotrain.report.weigh import weigh\n"
        f"for path in sorted(Path({str(RUNS)!r}).glob('*-megatron.toml')):\n"
        "    report = weigh(load_config(path), 8)\n"
        "    assert report.grid is not None\n"
        "    render(report), report.to_json()\n"
        "print([m for m in ('torch', 'megatron', 'deepspeed', 'numpy') if m in sys.modules])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"
