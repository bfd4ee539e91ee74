"""The plan's arithmetic, by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mpotrain.config import load_config
from mpotrain.engine.config import DeepSpeedConfig, LocalConfig
from mpotrain.engine.memory import state_memory, step_traffic
from mpotrain.report.text import render
from mpotrain.report.units import human_bytes
from mpotrain.report.weigh import weigh

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"


def test_parts_and_roles_add_up_to_the_total() -> None:
    for path in RUNS.glob("*.toml"):
        report = weigh(load_config(path))
        assert sum(report.by_role.values()) == report.num_parameters
        assert sum(report.by_part.values()) == report.num_parameters


def test_dense_and_compressed_counts() -> None:
    report = weigh(load_config(RUNS / "gpt2-small-ttm16.toml"))
    assert report.num_parameters == 68_085_504
    site = next(site for site in report.sites if site.family == "c_fc")
    assert site.parameters == 12 * 13_120
    assert site.dense_parameters == 12 * 768 * 3072
    assert site.modes == [(4, 4)] * 4 + [(3, 12)]
    # The dense twin of a run without feed-forward biases has none either.
    assert report.dense_num_parameters == 124_439_808 - 12 * (3072 + 768)


def test_dense_flops_are_six_per_weight_and_token() -> None:
    report = weigh(load_config(RUNS / "gpt2-small-dense.toml"))
    matrices = 50257 * 768 + 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    attention = 6 * 12 * 768 * 512
    assert report.model_flops_per_token == 6 * matrices + attention
    assert report.executed_flops_per_step == pytest.approx(
        report.model_flops_per_token * report.tokens_per_step, rel=1e-12
    )


def test_materialised_sites_execute_a_little_more_than_dense() -> None:
    dense = weigh(load_config(RUNS / "gpt2-small-dense.toml"))
    ttm = weigh(load_config(RUNS / "gpt2-small-ttm64.toml"))
    assert 1.0 < ttm.executed_flops_per_step / dense.executed_flops_per_step < 1.1


@pytest.mark.parametrize(
    ("stage", "dtype", "weights", "masters", "gradients", "moments"),
    [
        (0, "fp32", 4.0, 0.0, 4.0, 8.0),
        (1, "fp32", 4.0, 1.0, 4.0, 2.0),
        (2, "fp32", 4.0, 1.0, 1.0, 2.0),
        (3, "fp32", 1.0, 1.0, 1.0, 2.0),
        (1, "bf16", 2.0, 1.0, 4.0, 2.0),
        (3, "bf16", 0.5, 1.0, 1.0, 2.0),
    ],
)
def test_state_bytes_per_parameter_on_four_ranks(
    stage: int, dtype: str, weights: float, masters: float, gradients: float, moments: float
) -> None:
    engine = DeepSpeedConfig(zero_stage=stage, dtype=dtype)  # type: ignore[arg-type]
    count = 1_000_000
    memory = state_memory(engine, [count], 4)
    got = (memory.weights, memory.masters, memory.gradients, memory.moments)
    assert got == tuple(round(count * x) for x in (weights, masters, gradients, moments))


def test_zero3_keeps_small_parameters_whole_and_offload_moves_state() -> None:
    engine = DeepSpeedConfig(zero_stage=3)
    assert state_memory(engine, [50_000] * 10, 4).weights == 4 * 500_000
    offload = replace(engine, offload_optimizer=True)
    memory = state_memory(offload, [1_000_000], 4)
    assert memory.on_host == memory.masters + memory.moments
    assert memory.total == memory.weights + memory.gradients + memory.buffers


def test_local_state_is_sixteen_bytes_a_parameter() -> None:
    assert state_memory(LocalConfig(), [10, 20], 1).total == 16 * 30


def test_traffic_of_rings() -> None:
    sizes, world = [1_000_000], 4
    zero0 = step_traffic(DeepSpeedConfig(zero_stage=0), sizes, world, 3)
    zero1 = step_traffic(DeepSpeedConfig(zero_stage=1), sizes, world, 3)
    zero2 = step_traffic(DeepSpeedConfig(zero_stage=2), sizes, world, 3)
    zero3 = step_traffic(DeepSpeedConfig(zero_stage=3), sizes, world, 3)
    ring = 0.75 * 4 * 1_000_000
    assert zero0.total == 2 * ring
    assert (zero1.gradients, zero1.weights) == (2 * ring, ring)
    assert (zero2.gradients, zero2.weights) == (6 * ring, ring)
    assert (zero3.gradients, zero3.weights) == (3 * ring, 3 * ring)
    nothing_kept = DeepSpeedConfig(zero_stage=3, max_live_elements=0)
    assert step_traffic(nothing_kept, sizes, world, 3).weights == 6 * ring
    assert step_traffic(DeepSpeedConfig(), sizes, 1, 3).total == 0


def test_kept_and_transient_matrices_are_counted() -> None:
    path = RUNS / "gpt2-small-ttm64.toml"
    plain = weigh(load_config(path))
    kept = weigh(load_config(path, ["model.sites.c_fc.keep_weight=true"]))
    matrix = 4 * 768 * 3072
    assert kept.kept_by_plans == 12 * matrix
    assert plain.kept_by_plans == 0
    assert plain.transient >= matrix
    assert plain.memory_per_rank == (plain.state.total + plain.activations.total + plain.transient)


def test_recomputed_blocks_cost_one_more_forward() -> None:
    path = RUNS / "gpt2-small-dense.toml"
    plain = weigh(load_config(path))
    again = weigh(load_config(path, ["model.activation_checkpointing=true"]))
    blocks = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    extra = (2 * blocks + 2 * 12 * 768 * 512) * plain.tokens_per_step
    assert again.executed_flops_per_step - plain.executed_flops_per_step == pytest.approx(extra)
    assert again.activations.blocks < plain.activations.blocks / 5


def test_json_has_the_totals_and_the_problems() -> None:
    report = weigh(load_config(RUNS / "gpt2-small-ttm16.toml"), world_size=3)
    data = json.loads(json.dumps(report.to_json()))
    assert data["num_parameters"] == 68_085_504
    assert data["state"]["total"] == report.state.total
    assert any("train.global_batch_size" in line for line in data["problems"])
    assert "train.global_batch_size" in render(report)


def test_human_bytes() -> None:
    assert human_bytes(0) == "0 B"
    assert human_bytes(1023) == "1023 B"
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(5 * 2**40) == "5 TiB"


def test_prepared_data_are_held_against_the_model(tmp_path: Path) -> None:
    from mpotrain.data.config import PrepareConfig
    from mpotrain.data.prepare import prepare

    data = tmp_path / "data"
    prepare(PrepareConfig(sources=("synthetic:markov",), out=str(data), num_tokens=50_000,
                          num_workers=0))  # fmt: skip
    path = RUNS / "demo.toml"
    source = f'data.sources=[{{path="{data}"}}]'
    assert weigh(load_config(path, [source])).problems == []
    assert weigh(load_config(path, [source])).notes == []
    found = weigh(load_config(path, [source, "model.vocab_size=8"])).problems
    assert len(found) == 1
    assert found[0].startswith("model.vocab_size: 8 is smaller than the vocabulary")
    missing = weigh(load_config(path, [f'data.sources=[{{path="{tmp_path}/none"}}]']))
    assert missing.problems == []
    assert "is not prepared here" in render(missing)
