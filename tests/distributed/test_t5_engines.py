"""T5 under every layout of ranks: loss, gradients, weights and moments of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed.engines import (
    CPU_WORLD,
    State,
    assert_same_steps,
    compute_with_bf16_weights,
    largest_difference,
    same_bits,
    whole_state,
    zero,
)

from mpotrain.batch import Batch
from mpotrain.engine.base import Engine, EvalResult, StepResult
from mpotrain.engine.config import DeepSpeedConfig, LocalConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.local import LocalEngine
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config, T5Sites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.moe.config import AsymmetricExpertSite, MoEConfig, MPOExpertSite, RouterConfig
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig
from mpotrain.train.optim import build_optimizer

CLIP = 0.5
GLOBAL, MICRO = 16, 2
SEED = 11
STEPS = 5
VOCABULARY, SOURCE, TARGET = 40, 8, 6
LOCAL = LocalConfig(device="cpu")
Outcome = tuple[list[StepResult], State, EvalResult]

PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "head_size": 6, "num_layers": 2,
    "num_decoder_layers": 1, "num_heads": 2, "ffn_size": 32, "relative_buckets": 8,
    "relative_distance": 6, "dropout": 0.1,
}  # fmt: skip
MIXTURES = T5Config(
    **PLAIN,
    moe=MoEConfig(
        num_experts=4,
        router=RouterConfig(z_loss=1e-3, balance_rate=1e-3, jitter=0.1),
        c_fc=MPOExpertSite(
            start="independent", in_modes=(2, 2, 2, 2, 1), out_modes=(2, 2, 2, 2, 2)
        ),
        c_proj=MPOExpertSite(start="independent", in_modes=(4, 4, 2), out_modes=(2, 2, 4), cap=6),
    ),
)
DROPPING = T5Config(
    **(PLAIN | {"num_decoder_layers": 2}),
    activation_checkpointing=True,
    moe=MoEConfig(
        num_experts=4,
        every=2,
        router=RouterConfig(top_k=2, capacity_factor=0.75),
        c_proj=AsymmetricExpertSite(
            start="independent", in_mode=8, out_mode=4, in_bond=4, out_bond=4
        ),
    ),
)
DENSE = T5Config(**PLAIN)
TENSORIZED = T5Config(
    **PLAIN,
    activation_checkpointing=True,
    sites=T5Sites(
        embedding=MPOSite(in_modes=(5, 4, 2), out_modes=(2, 4, 2), cap=6),
        query=MPOSite(in_modes=(4, 4), out_modes=(4, 3)),
        c_fc=MPOSite(in_modes=(4, 2, 2), out_modes=(4, 4, 2), cap=7),
    ),
)


def batch_of(indices: range) -> Batch:
    """Rows of two documents each that count different numbers of targets."""
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(9_000 + index)
        source = torch.randint(VOCABULARY, (SOURCE,), generator=generator)
        target = torch.randint(VOCABULARY, (TARGET + 1,), generator=generator)
        rows.append(
            (
                target[:-1], target[1:], torch.arange(TARGET) < 1 + index * 5 % TARGET, source,
                1 + (torch.arange(TARGET) >= 1 + index % 4).long(),
                1 + (torch.arange(SOURCE) >= 2 + index % 5).long(),
            )
        )  # fmt: skip
    inputs, targets, mask, sources, documents, source_documents = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )
    return Batch(
        inputs=inputs,
        targets=targets,
        loss_mask=mask,
        sample_ids=torch.tensor(list(indices)),
        document_ids=documents,
        encoder_inputs=sources,
        encoder_document_ids=source_documents,
    )


def no_change(model: T5) -> None:
    """Leave the model as it is."""


def engine_of(
    world: World,
    config: LocalConfig | DeepSpeedConfig,
    section: T5Config,
    expert_ranks: int,
    change: Callable[[T5], None],
) -> Engine:
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    model = T5(section, seed=SEED, compute_dtype=dtype)
    change(model)
    optimizer = build_optimizer(model, AdamWConfig(core_lr_factor=0.5, weight_decay=0.1))
    if isinstance(config, LocalConfig):
        return LocalEngine(model, optimizer, config=config, world=world, seed=SEED, clip_norm=CLIP)
    return DeepSpeedEngine(
        model, optimizer, config=config, world=world, seed=SEED, clip_norm=CLIP,
        micro_batch_size=MICRO, accumulation=GLOBAL // MICRO // world.size,
        global_batch_size=GLOBAL, expert_ranks=expert_ranks,
    )  # fmt: skip


def train(
    world: World,
    config: LocalConfig | DeepSpeedConfig,
    section: T5Config,
    expert_ranks: int = 1,
    change: Callable[[T5], None] = no_change,
) -> Outcome:
    engine = engine_of(world, config, section, expert_ranks, change)
    results = []
    for step in range(STEPS):
        numbers = range(world.rank, GLOBAL // MICRO, world.size)
        starts = [step * GLOBAL + number * MICRO for number in numbers]
        batches = [batch_of(range(start, start + MICRO)) for start in starts]
        results.append(engine.step(batches, lr=1e-3 * (1 + step) / 4, step=step, detail=True))
    # Ranks have different numbers of held-out batches: exchanges must not wait for ever.
    held = engine.evaluate([batch_of(range(900, 903))] if world.rank == 0 else [])
    state = whole_state(engine)
    engine.close()
    return results, state, held


def assert_equal_to_local(outcomes: list[Outcome], section: T5Config) -> list[StepResult]:
    wanted, wanted_state, wanted_held = train(CPU_WORLD, LOCAL, section)
    assert max(result.grad_norm for result in wanted) > CLIP
    for results, state, held in outcomes:
        assert_same_steps(results, wanted, 1e-5)
        assert largest_difference(state, wanted_state) < 1e-5
        assert held.loss_sum == pytest.approx(wanted_held.loss_sum, rel=1e-5)
        assert torch.equal(held.statistics["correct"], wanted_held.statistics["correct"])
        for one, other in zip(results, wanted, strict=True):
            assert one.statistics.keys() == other.statistics.keys()
            for name in one.statistics.keys() & {"expert_tokens", "dropped", "tokens"}:
                assert torch.equal(one.statistics[name], other.statistics[name])
    assert all(same_bits(state, outcomes[0][1]) for _, state, _ in outcomes)
    return wanted


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("world", "expert_ranks"), [(2, 1), (2, 2), (4, 2)])
def test_mixtures_in_every_layout_equal_one_process(
    run_ranks: Any, world: int, expert_ranks: int, stage: int
) -> None:
    outcomes = run_ranks(world)(train, zero(stage), MIXTURES, expert_ranks)
    wanted = assert_equal_to_local(outcomes, MIXTURES)
    assert {"dense", "central", "auxiliary"} <= (wanted[0].grad_norm_by_role or {}).keys()
    # Two mixtures of the encoder, then one of the decoder, whose rows are shorter.
    tokens = wanted[0].statistics["tokens"].tolist()
    assert tokens == [GLOBAL * SOURCE, GLOBAL * SOURCE, GLOBAL * TARGET]
    assert wanted[0].statistics["expert_tokens"].shape == (3, 4)


@pytest.mark.parametrize(("stage", "expert_ranks"), [(1, 2), (3, 1)])
def test_full_experts_equal_one_process(run_ranks: Any, stage: int, expert_ranks: int) -> None:
    """Two experts of each token, some full, blocks computed twice; dense first matrices."""
    outcomes = run_ranks(2)(train, zero(stage), DROPPING, expert_ranks)
    wanted = assert_equal_to_local(outcomes, DROPPING)
    assert "expert" in (wanted[0].grad_norm_by_role or {})
    assert wanted[0].statistics["dropped"].min() > 0


@pytest.mark.parametrize("section", [DENSE, TENSORIZED], ids=["dense", "tensorized"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_models_without_experts_equal_one_process(
    run_ranks: Any, stage: int, section: T5Config
) -> None:
    assert_equal_to_local(run_ranks(2)(train, zero(stage), section), section)


@pytest.mark.parametrize(("stage", "section"), [(2, MIXTURES), (3, DENSE)])
def test_bf16_follows_local_bf16(run_ranks: Any, stage: int, section: T5Config) -> None:
    local = LocalConfig(device="cpu", dtype="bf16")
    wanted, _, wanted_held = train(CPU_WORLD, local, section, change=compute_with_bf16_weights)
    for results, _, held in run_ranks(2)(train, zero(stage, dtype="bf16"), section):
        assert results[0].loss == pytest.approx(wanted[0].loss, rel=1e-6)
        assert results[0].grad_norm_by_role == pytest.approx(wanted[0].grad_norm_by_role, rel=1e-3)
        for one, other in zip(results, wanted, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=2e-3)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)
        assert held.mean == pytest.approx(wanted_held.mean, rel=2e-3)
