"""Depth-shared encoders in every engine: what layers share has the gradients of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from distributed.engines import (
    CPU_WORLD,
    SMALL,
    State,
    assert_same_steps,
    compute_with_bf16_weights,
    largest_difference,
    same_bits,
    whole_state,
)

from mpotrain.batch import Batch
from mpotrain.engine.base import Engine, StepResult
from mpotrain.engine.config import NO_MASK, CentralMaskConfig, DeepSpeedConfig, LocalConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.local import LocalEngine
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.encoder_block import Given
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig
from mpotrain.nn.spectra import SiteSpectrum, model_spectra
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig
from mpotrain.train.optim import build_optimizer

LOCAL = LocalConfig(device="cpu")
STEPS, GLOBAL, MICRO, SEED, CLIP, LR = 5, 8, 2, 11, 0.7, 5e-4
VOCABULARY, LENGTH = 40, 10
SQUARE = MPOSite(in_modes=(2, 2, 2, 2, 1), out_modes=(2, 1, 2, 2, 2))
SITES = EncoderSites(
    query=SQUARE,
    # The gradient of a key bias is zero but for rounding, which Adam blows up.
    key=MPOSite(in_modes=(4, 4), out_modes=(4, 4), bias=False),
    value=SQUARE,
    attention_out=SQUARE,
    c_fc=MPOSite(in_modes=(2, 2, 2, 2, 1), out_modes=(2, 2, 2, 2, 2)),
    c_proj=MPOSite(in_modes=(4, 4, 2), out_modes=(2, 4, 2), cap=6),
)
MPOBERT = EncoderConfig(
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    ffn_size=32,
    embedding_size=8,
    dropout=0.1,
    attention_dropout=0.0,
    init_std=0.12,
    sites=SITES,
    sharing=SharingConfig(scope="central", groups=2, vectors="tied"),
    adapter=AdapterConfig(rank=2, std=0.3),
)
ALBERT = replace(MPOBERT, sharing=SharingConfig(scope="all", groups=2))
RECOMPUTED = replace(MPOBERT, activation_checkpointing=True)
Change = Callable[[Encoder], None]


def zero(stage: int, **settings: Any) -> DeepSpeedConfig:
    # Nothing is so small that stage 3 keeps it whole.
    small = SMALL | {"persistence_threshold": 0}
    return DeepSpeedConfig(**{"zero_stage": stage, "device": "cpu", **small, **settings})


def no_change(model: Encoder) -> None:
    """Leave the model as it is."""


def engine_of(
    world: World,
    engine: LocalConfig | DeepSpeedConfig,
    config: EncoderConfig,
    mask: CentralMaskConfig = NO_MASK,
    change: Change = no_change,
) -> Engine:
    dtype = torch.bfloat16 if engine.dtype == "bf16" else torch.float32
    model = Encoder(config, seed=SEED, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():  # also what starts at zero: adapters and biases
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    change(model)
    settings = AdamWConfig(core_lr_factor=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, settings, mask)
    if isinstance(engine, LocalConfig):
        return LocalEngine(
            model, optimizer, config=engine, world=world, seed=SEED, clip_norm=CLIP,
            central_mask=mask,
        )  # fmt: skip
    return DeepSpeedEngine(
        model, optimizer, config=engine, world=world, seed=SEED, clip_norm=CLIP,
        micro_batch_size=MICRO, accumulation=GLOBAL // MICRO // world.size,
        global_batch_size=GLOBAL, central_mask=mask,
    )  # fmt: skip


def batch_of(indices: range) -> Batch:
    """Rows of two documents and padding; every third has a pair, one target or more is masked."""
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(9_000 + index)
        tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
        cut = 3 + index % 4
        documents = torch.tensor([1] * cut + [2] * (LENGTH - cut))
        documents[LENGTH - index % 3 :] = 0
        mask = torch.rand(LENGTH, generator=generator) < 0.2
        mask[index % 3] = True
        labels = torch.full((LENGTH,), -100)
        if index % 3:
            labels[0] = index % 2
        positions = torch.tensor([*range(cut), *range(LENGTH - cut)])
        types = (positions > 1).long()
        fields = (tokens[0], tokens[1], mask & (documents > 0), documents, positions, types, labels)
        rows.append(fields)
    inputs, targets, mask, documents, positions, types, labels = map(
        torch.stack, zip(*rows, strict=True)
    )
    return Batch(
        inputs, targets, mask, torch.tensor(list(indices)),
        document_ids=documents, positions=positions, token_types=types, pair_labels=labels,
    )  # fmt: skip


def run_steps(engine: Engine, first: int, last: int) -> list[StepResult]:
    world, results = engine.world, []
    for step in range(first, last):
        slots = range(GLOBAL // MICRO // world.size)
        starts = [step * GLOBAL + (slot * world.size + world.rank) * MICRO for slot in slots]
        results.append(
            engine.step(
                [batch_of(range(start, start + MICRO)) for start in starts],
                lr=LR * (1 + step) / 4,
                step=step,
                detail=True,
            )
        )
    return results


def train(
    world: World,
    config: DeepSpeedConfig | LocalConfig,
    model: EncoderConfig,
    change: Change = no_change,
) -> tuple[list[StepResult], State, Any]:
    engine = engine_of(world, config, model, change=change)
    results = run_steps(engine, 0, STEPS)
    held = engine.evaluate([batch_of(range(900, 903))] if world.rank == 0 else [])
    state = whole_state(engine)
    engine.close()
    return results, state, held


def assert_equal_to_local(outcomes: list[Any], model: EncoderConfig) -> list[StepResult]:
    wanted, wanted_state, wanted_held = train(CPU_WORLD, LOCAL, model)
    for results, state, held in outcomes:
        assert_same_steps(results, wanted, 1e-5)
        assert largest_difference(state, wanted_state) < 1e-5
        assert held.loss_sum == pytest.approx(wanted_held.loss_sum, rel=1e-5)
        assert held.statistics.keys() == wanted_held.statistics.keys()
        for one, other in zip([held, *results], [wanted_held, *wanted], strict=True):
            for name, value in other.statistics.items():
                torch.testing.assert_close(one.statistics[name], value, rtol=1e-5, atol=1e-5)
    assert all(same_bits(state, outcomes[0][1]) for _, state, _ in outcomes)
    return wanted


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_equals_one_process(run_ranks: Any, stage: int) -> None:
    wanted = assert_equal_to_local(run_ranks(2)(train, zero(stage), MPOBERT), MPOBERT)
    assert any(result.grad_norm > CLIP for result in wanted)
    assert {"dense", "central", "auxiliary", "adapter"} == (
        wanted[0].grad_norm_by_role or {}
    ).keys()
    assert float(wanted[0].statistics["num_pairs"]) > 0


@pytest.mark.parametrize("model", [ALBERT, RECOMPUTED], ids=["whole-blocks", "recomputed"])
@pytest.mark.parametrize("stage", [1, 3])
def test_other_ways_of_sharing(run_ranks: Any, stage: int, model: EncoderConfig) -> None:
    assert_equal_to_local(run_ranks(2)(train, zero(stage), model), model)


def test_masters_and_weights_in_host_memory(run_ranks: Any) -> None:
    config = zero(3, offload_optimizer=True, offload_parameters=True)
    assert_equal_to_local(run_ranks(2)(train, config, MPOBERT), MPOBERT)


def forget_later_layers(model: Encoder) -> None:
    """Give all layers but the first of a group a central tensor that has no gradient."""
    given = model.given

    def without_gradient(layer: int) -> Given:
        parts = given(layer)
        if layer % 2:
            for family in model.config.banked_families():
                parts[family]["central"] = parts[family]["central"].detach()
        return parts

    model.given = without_gradient  # type: ignore[method-assign]


def test_a_central_tensor_without_the_gradients_of_later_layers_is_caught(run_ranks: Any) -> None:
    outcomes = run_ranks(2)(train, zero(1), MPOBERT, forget_later_layers)
    with pytest.raises(AssertionError):
        assert_equal_to_local(outcomes, MPOBERT)
    wrong, right = outcomes[0][0][0], train(CPU_WORLD, LOCAL, MPOBERT)[0][0]
    assert wrong.loss == pytest.approx(right.loss, rel=1e-6)  # the forward pass is the same
    norms = [(result.grad_norm_by_role or {})["central"] for result in (wrong, right)]
    assert abs(norms[0] / norms[1] - 1) > 1e-2


def shares(world: World) -> dict[str, tuple[int, int]]:
    engine = engine_of(world, zero(3), MPOBERT)
    run_steps(engine, 0, 1)
    found = {
        name: (parameter.ds_tensor.ds_numel, parameter.ds_numel)  # type: ignore[attr-defined]
        for name, parameter in engine.model.named_parameters()
        if not parameter.ds_persist  # type: ignore[attr-defined]
    }
    engine.close()
    return found


def test_stage_3_splits_the_bank(run_ranks: Any) -> None:
    for found in run_ranks(2)(shares):
        names = {info.name for info in MPOBERT.parameters()}
        assert found.keys() == names
        bank = [sizes for name, sizes in found.items() if name.startswith("bank.")]
        assert len(bank) == 12
        assert all(2 * own < whole + 4 for own, whole in bank)


def look_at_whole_weights(
    world: World, config: DeepSpeedConfig | LocalConfig
) -> tuple[list[SiteSpectrum], float, float]:
    """Read spectra on every rank, the loss of a batch on rank 0 alone, and train on."""
    engine, loss = engine_of(world, config, MPOBERT), 0.0
    run_steps(engine, 0, 2)
    with engine.full_parameters():
        spectra = model_spectra(engine.model)
        if world.is_main:
            engine.model.eval()
            with torch.no_grad():
                loss = float(engine.model(batch_of(range(900, 903))).loss_sum)
            engine.model.train()
    after = run_steps(engine, 2, 3)[0].loss
    engine.close()
    return spectra, loss, after


def test_whole_weights_of_stage_3_can_be_read(run_ranks: Any) -> None:
    wanted, wanted_loss, wanted_after = look_at_whole_weights(CPU_WORLD, LOCAL)
    outcomes = run_ranks(2)(look_at_whole_weights, zero(3))
    assert outcomes[0][1] == pytest.approx(wanted_loss, rel=1e-5)
    for spectra, _, after in outcomes:
        assert after == pytest.approx(wanted_after, rel=1e-5)
        assert len(spectra) == 6 * MPOBERT.num_layers
        for one, other in zip(spectra, wanted, strict=True):
            assert (one.name, one.bank) == (other.name, other.bank)
            assert one.norms == pytest.approx(other.norms, rel=1e-4)
            assert one.entropies == pytest.approx(other.entropies, rel=1e-3)


def train_frozen(
    world: World, config: DeepSpeedConfig | LocalConfig
) -> tuple[list[State], list[StepResult]]:
    mask = CentralMaskConfig(probability=1.0)
    engine = engine_of(world, config, MPOBERT, mask)
    states, results = [whole_state(engine)], []
    for step in range(3):
        results += run_steps(engine, step, step + 1)
        states.append(whole_state(engine))
    engine.close()
    return states, results


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_bank_rests_bit_for_bit_while_auxiliaries_move(run_ranks: Any, stage: int) -> None:
    wanted, steps = train_frozen(CPU_WORLD, LOCAL)
    for states, results in run_ranks(2)(train_frozen, zero(stage)):
        assert_same_steps(results, steps, 1e-5)
        assert largest_difference(states[-1], wanted[-1]) < 1e-5
        for before, after in pairwise(states):
            for info in MPOBERT.parameters():
                one, other = before[info.name]["weight"], after[info.name]["weight"]
                is_same = torch.equal(one.view(torch.int32), other.view(torch.int32))
                assert is_same == (info.role == "central"), info.name


# In stage 3 the backward pass adds bf16 gradients of activations in another order.
@pytest.mark.parametrize(("stage", "rel"), [(1, 1e-3), (3, 2e-2)])
def test_bf16_follows_local_bf16(run_ranks: Any, stage: int, rel: float) -> None:
    local = LocalConfig(device="cpu", dtype="bf16")
    wanted, _, _ = train(CPU_WORLD, local, MPOBERT, compute_with_bf16_weights)
    for results, _, _ in run_ranks(2)(train, zero(stage, dtype="bf16"), MPOBERT):
        assert results[0].loss == pytest.approx(wanted[0].loss, rel=1e-6)
        assert results[0].grad_norm_by_role == pytest.approx(wanted[0].grad_norm_by_role, rel=rel)
        for one, other in zip(results, wanted, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=3e-3)
        # Adam makes whole steps of rounding where a gradient is next to nothing: norms part soon.
        for one, other in zip(results[:4], wanted[:4], strict=True):
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.1)
