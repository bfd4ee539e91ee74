"""Encoders cut over tensor-, context- and pipeline-parallel ranks compute what the local one does.

Chunks of a pipeline are run one after the other in one process; what travels between stages and
how gradients of copies are summed there is the engine's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.megatron_encoder_cases import (
    FORGET_COPIES,
    FORGET_PARTIAL,
    LAYOUTS,
    LENGTH,
    MPOBERT,
    NETWORKS,
    ROWS,
    VOCABULARY,
    Outcome,
    Run,
    build_chunks,
    compare,
    local,
    rows,
    through,
)
from distributed.megatron_grid import megatron_grid
from torch import nn

from mpotrain.batch import Batch
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World


@pytest.fixture
def outcomes(run_ranks: Any) -> Run:
    """What a layout makes of a network, on every rank."""

    def run(
        network: str,
        layout: str,
        batch: Batch | None = None,
        *,
        places: int = 1,
        forget: str | None = None,
        training: bool = True,
    ) -> list[Outcome]:
        parallel = LAYOUTS[layout]
        batch = rows() if batch is None else batch
        arguments = (network, parallel, batch, places, forget, training)
        found: list[Outcome] = run_ranks(parallel.model_ranks)(compare, *arguments)
        return found

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_layout_has_the_loss_and_gradients_of_the_local_network(
    outcomes: Run, network: str, layout: str
) -> None:
    for outcome in outcomes(network, layout):
        assert outcome.agrees(), outcome


@pytest.mark.parametrize("places", [2, 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_chunks_of_a_pipeline_do_too(outcomes: Run, network: str, places: int) -> None:
    (outcome,) = outcomes(network, "one", places=places)
    assert outcome.agrees(), outcome


def test_chunks_of_a_pipeline_over_tensor_and_context_parallel_ranks(outcomes: Run) -> None:
    for outcome in outcomes("mpobert", "tp2-sp-cp2", places=2):
        assert outcome.agrees(), outcome


@pytest.mark.parametrize("layout", ["tp2-sp", "cp2"])
def test_bare_tokens_and_a_weight_of_pairs_of_their_own(outcomes: Run, layout: str) -> None:
    # Without documents everything is seen; without a weight the micro-batch is the whole batch,
    # whose pairs and targets lie on several context-parallel ranks.
    for outcome in outcomes("mpobert", layout, rows(bare=True)):
        assert outcome.agrees(), outcome
        assert outcome.reference > outcome.expected["loss_sum"]


@pytest.mark.parametrize("layout", ["one", "tp4-sp", "tp2-sp-cp2"])
@pytest.mark.parametrize("network", ["mpobert", "bert-pre"])
def test_evaluation_counts_right_predictions(outcomes: Run, network: str, layout: str) -> None:
    for outcome in outcomes(network, layout, training=False):
        assert outcome.agrees(), outcome
        assert "correct" in outcome.sums
        assert outcome.reference == outcome.expected["loss_sum"]


def test_right_predictions_are_not_always_none(outcomes: Run) -> None:
    everything = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    targets = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % VOCABULARY
    batch = rows(loss_mask=everything, targets=targets)
    outcome = outcomes("bert", "tp4", batch, training=False)[0]
    assert outcome.sums["correct"] == outcome.expected["correct"] > 0


@pytest.mark.parametrize("layout", ["one", "tp2-sp-cp2"])
@pytest.mark.parametrize("network", ["mpobert", "bert-pre"])
@pytest.mark.parametrize("training", [True, False])
def test_without_targets_and_pairs_all_gradients_are_zero(
    outcomes: Run, network: str, layout: str, training: bool
) -> None:
    for outcome in outcomes(network, layout, rows(empty=True), training=training):
        assert outcome.error == 0.0
        assert outcome.objective == 0.0
        assert not any(outcome.sums.values())


def test_gradients_that_ranks_compute_in_parts_must_be_summed(outcomes: Run) -> None:
    assert outcomes("mpobert", "tp2", forget=FORGET_PARTIAL)[0].error > 1e-2
    assert outcomes("bert", "tp2-sp", forget=FORGET_PARTIAL)[0].error > 1e-2


@pytest.mark.parametrize("network", ["mpobert", "albert", "bert"])
def test_gradients_of_copies_must_be_summed(outcomes: Run, network: str) -> None:
    # 4 chunks: also the groups of two layers are cut.
    assert outcomes(network, "one", places=4, forget=FORGET_COPIES)[0].error > 1e-2


def dropped(world: World) -> list[float]:
    """Objectives of two micro-batches in training with dropout, and of one in evaluation."""
    with megatron_grid(world, LAYOUTS["tp2-sp"]):
        model = local(replace(MPOBERT, dropout=0.5))
        (chunk,) = build_chunks(model, LAYOUTS["tp2-sp"], 1)
        found = [float(through([chunk], rows())[0]) for _ in range(2)]
        return [*found, float(through([chunk.eval()], rows())[0])]


def test_dropout_is_on_in_training_and_alike_where_ranks_compute_alike(run_ranks: Any) -> None:
    first, second = run_ranks(2)(dropped)
    assert first == second
    assert len(set(first)) == 3


def embedded(world: World) -> float:
    """Part of the embedded features that dropout has set to zero."""
    with megatron_grid(world, ParallelConfig()):
        model = local(replace(NETWORKS["bert"], dropout=0.25))
        first, _ = build_chunks(model, ParallelConfig(), 2)
        # Without layers, and so without their dropout.
        first.encoder.layers = nn.ModuleList()
        hidden, _ = through([first], rows())
        return float((hidden == 0).double().mean())


def test_embeddings_are_dropped_out(run_ranks: Any) -> None:
    assert run_ranks(1)(embedded)[0] == pytest.approx(0.25, abs=0.05)


def in_bf16(world: World) -> tuple[float, float, str]:
    with megatron_grid(world, ParallelConfig()):
        model = local(MPOBERT, torch.bfloat16)
        chunks = build_chunks(model, ParallelConfig(), 2, torch.bfloat16)
        batch = rows(pair_weight=torch.tensor(3.5))
        objective, sums = through(chunks, batch)
        hidden = chunks[0](batch, micro_of())
        assert hidden.shape == (LENGTH, ROWS, 16)
        assert objective.dtype == sums["loss_sum"].dtype == torch.float32
        return float(objective), float(model(batch).objective), str(hidden.dtype)


def micro_of() -> Any:
    from mpotrain.engine.megatron.micro import Micro, Tally

    return Micro(slot=0, is_last=True, loss_scale=1.0, auxiliary_scale=1.0, tally=Tally())


def test_activations_have_the_dtype_of_weights_and_losses_are_wide(run_ranks: Any) -> None:
    ((objective, reference, dtype),) = run_ranks(1)(in_bf16)
    assert dtype == "torch.bfloat16"
    assert objective == pytest.approx(reference, rel=2e-2)


def too_long(world: World) -> str:
    with megatron_grid(world, ParallelConfig()):
        chunks = build_chunks(local(MPOBERT), ParallelConfig(), 1)
        tokens = torch.zeros(1, LENGTH + 1, dtype=torch.int64)
        batch = Batch(tokens, tokens, tokens.bool(), torch.arange(1))
        with pytest.raises(ValueError, match="context_length") as raised:
            through(chunks, batch)
        return str(raised.value)


def test_a_sequence_that_is_too_long_is_refused(run_ranks: Any) -> None:
    assert "17 tokens" in run_ranks(1)(too_long)[0]
