"""T5 of the Megatron engine equals the local T5 in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.megatron_grid import megatron_grid
from distributed.megatron_t5_cases import (
    DENSE,
    MPO_MOE,
    ONE,
    ROWS,
    SECTIONS,
    SEQUENCE,
    TARGET,
    TENSOR,
    TENSORIZED,
    Outcome,
    Task,
    assert_equal_to_local,
    batch_of,
    build,
    compute,
    empty_chunk,
    float_means_double,
    micro_of,
    reduced_gradients,
    reference,
    whole_gradients,
)
from torch import Tensor

from mpotrain.config import load_config
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

RUNS = sorted((Path(__file__).parents[2] / "configs" / "runs").glob("*t5*.toml"))


@pytest.mark.parametrize("kind", SECTIONS)
def test_one_rank_equals_the_local_network(run_ranks: Any, kind: str) -> None:
    task = Task(SECTIONS[kind], ONE, packed=kind != "mpo")
    assert_equal_to_local(run_ranks(1)(compute, task), task)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("parallel", [TENSOR, SEQUENCE], ids=["tp", "tp-sp"])
@pytest.mark.parametrize("kind", ["dense", "mpo"])
def test_cut_matrices_equal_the_local_network(
    run_ranks: Any, kind: str, parallel: ParallelConfig, packed: bool
) -> None:
    task = Task(SECTIONS[kind], parallel, packed=packed)
    outcomes = run_ranks(2)(compute, task)
    assert_equal_to_local(outcomes, task)
    cut = {p.name: p for p, _ in outcomes[1].gradients if any(c.parts == 2 for c in p.cuts)}
    assert {"encoder.relative_bias.weight", "token_embedding.weight"} <= cut.keys()


@pytest.mark.parametrize(
    "parallel",
    [
        SEQUENCE,
        ParallelConfig(expert=2),
        ParallelConfig(tensor=2, sequence=True, expert=2),
        ParallelConfig(tensor=2, sequence=True, expert_tensor=2),
    ],
    ids=["tp-sp", "ep", "tp-sp-ep", "tp-sp-etp"],
)
@pytest.mark.parametrize("kind", ["mpo-moe", "dense-moe"])
def test_mixtures_equal_the_local_network(
    run_ranks: Any, kind: str, parallel: ParallelConfig
) -> None:
    task = Task(SECTIONS[kind], parallel)
    assert_equal_to_local(run_ranks(2)(compute, task), task)


@pytest.mark.parametrize("kind", ["mpo", "mpo-moe"])
def test_tensor_and_data_ranks_equal_the_local_network(run_ranks: Any, kind: str) -> None:
    """Two data ranks of two tensor ranks; experts of two tensor ranks lie on the other."""
    task = Task(SECTIONS[kind], ParallelConfig(tensor=2, sequence=True, expert=2))
    if kind == "mpo":
        task = replace(task, parallel=SEQUENCE)
    assert_equal_to_local(run_ranks(4)(compute, task), task)


@pytest.mark.parametrize("kind", ["mpo", "mpo-moe"])
def test_evaluation_counts_right_predictions(run_ranks: Any, kind: str) -> None:
    # In these batches the network is right on targets that count and on some that do not.
    task = Task(SECTIONS[kind], SEQUENCE, training=False, num_micros=2, first_batch=1)
    outcomes = run_ranks(2)(compute, task)
    assert_equal_to_local(outcomes, task)
    assert any(sums["correct"] > 0 for sums in outcomes[0].sums)


def test_matrices_kept_over_a_step_give_the_gradient_of_all_its_micro_batches(
    run_ranks: Any,
) -> None:
    section = replace(TENSORIZED, activation_checkpointing=False)
    task = Task(section, SEQUENCE, num_micros=2, is_cached=True)
    assert_equal_to_local(run_ranks(2)(compute, task), task)


def test_bf16_stays_near_float64(run_ranks: Any) -> None:
    task = Task(MPO_MOE, SEQUENCE, dtype=torch.bfloat16)
    wide, narrow = (
        run_ranks(2)(compute, one) for one in (replace(task, dtype=torch.float64), task)
    )
    assert narrow[0].sums[0]["loss_sum"].dtype == torch.float32
    assert narrow[0].losses[0] == pytest.approx(wide[0].losses[0], rel=0.05)
    table = "decoder.relative_bias.weight"
    for outcome, other in zip(narrow, wide, strict=True):
        parts, expected = (
            {placement.name: grad for placement, grad in found.gradients}
            for found in (outcome, other)
        )
        assert parts[table].dtype == torch.bfloat16
        cosine = torch.cosine_similarity(
            parts[table].double().flatten(), expected[table].flatten(), 0
        )
        assert cosine > 0.95


def through_the_schedule(world: World, parallel: ParallelConfig) -> Outcome:
    """Two micro-batches on megatron-core's schedule for one stage."""
    with megatron_grid(world, parallel), float_means_double():
        from megatron.core.pipeline_parallel import get_forward_backward_func

        chunk, outcome = build(DENSE, parallel), Outcome([], [], [], [])

        def forward_step(batches: Iterator[int], model: Any) -> tuple[Tensor, Any]:
            batch = batch_of(10 * next(batches), packed=True)
            objective = model(batch, micro_of(batch, 0, 1))
            return objective, lambda loss: (
                loss,
                batch.loss_mask.sum().int(),
                {"loss": loss.item()},
            )

        told = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(2)),
            model=chunk,
            num_microbatches=2,
            seq_length=TARGET,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        outcome.losses = [one["loss"] for one in told]
        outcome.gradients = reduced_gradients(chunk)
        return outcome


def test_schedule_runs_micro_batches_one_after_the_other(run_ranks: Any) -> None:
    outcomes = run_ranks(2)(through_the_schedule, SEQUENCE)
    model, outputs = reference(Task(DENSE, SEQUENCE, num_micros=2), 1)
    assert outcomes[0].losses == pytest.approx([o.loss_sum.item() for o in outputs.values()])
    found = whole_gradients(outcomes)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("parallel", [TENSOR, SEQUENCE], ids=["tp", "tp-sp"])
def test_dropout_trains_and_agrees_on_what_ranks_have_in_common(
    run_ranks: Any, parallel: ParallelConfig
) -> None:
    dropping = replace(TENSORIZED, dropout=0.3)
    outcomes = run_ranks(2)(compute, Task(dropping, parallel))
    # Gradients of tensors that both ranks hold are compared in here.
    gradients = whole_gradients(outcomes)
    assert outcomes[0].losses == outcomes[1].losses
    assert all(grad.isfinite().all() for grad in gradients.values())
    without = run_ranks(2)(compute, Task(TENSORIZED, parallel))
    assert abs(outcomes[0].losses[0] / without[0].losses[0] - 1) > 1e-3
    # A second pass over the layers drops the same elements.
    kept = replace(dropping, activation_checkpointing=False)
    for name, grad in whole_gradients(run_ranks(2)(compute, Task(kept, parallel))).items():
        torch.testing.assert_close(gradients[name], grad, rtol=1e-9, atol=1e-12)


def dropped_elements(world: World, parallel: ParallelConfig) -> Tensor:
    with megatron_grid(world, parallel):
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(5)
        chunk = build(replace(DENSE, dropout=0.5), parallel).train()
        kept: Tensor = chunk._drop(torch.ones(64))
        return kept


def test_ranks_drop_alike_where_they_hold_the_same_positions(run_ranks: Any) -> None:
    one, other = run_ranks(2)(dropped_elements, TENSOR)
    assert torch.equal(one, other)
    assert 0 < one.count_nonzero() < 64
    one, other = run_ranks(2)(dropped_elements, SEQUENCE)
    assert not torch.equal(one, other)


def refusals(world: World) -> list[str]:
    with megatron_grid(world, SEQUENCE):
        chunk = build(DENSE, SEQUENCE)
        whole = batch_of(0, packed=True)
        said = []
        for batch in (
            batch_of(0, packed=True, source=7),
            batch_of(0, packed=True, target=5),
            replace(whole, encoder_inputs=None),
            replace(whole, document_ids=None),
            replace(whole, encoder_document_ids=None),
        ):
            with pytest.raises(ValueError, match=r"positions|encoder_inputs|document") as caught:
                chunk(batch, micro_of(batch, 0, 1))
            said.append(str(caught.value))
        with pytest.raises(ValueError, match="another stage"):
            chunk.set_input_tensor([torch.ones(1)])
        chunk.set_input_tensor(None)
        chunk.set_input_tensor([None])
        return said


def test_batches_that_do_not_fit_are_refused(run_ranks: Any) -> None:
    said, _ = run_ranks(2)(refusals)
    assert said[0].startswith("encoder_inputs: 7 positions cannot be split over 2 ranks")
    assert said[1].startswith("inputs: 5 positions cannot be split over 2 ranks")
    assert "span_corruption" in said[2]
    assert said[3].startswith("document ids of one sequence alone")
    assert said[4] == said[3]


def held_tensors(world: World, section: T5Config, parallel: ParallelConfig) -> list[Any]:
    """Placements of a chunk that is built without memory for its weights."""
    with megatron_grid(world, parallel):
        from mpotrain.engine.megatron.placement import placement_of

        chunk = empty_chunk(section, parallel, torch.device("meta"), torch.float32)
        for parameter in chunk.parameters():
            assert tuple(parameter.shape) == placement_of(parameter).local_shape
        return [placement_of(parameter) for parameter in chunk.parameters()]


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_chunk_holds_every_tensor_of_a_run_once(run_ranks: Any, run: Path) -> None:
    section = load_config(run).model
    assert isinstance(section, T5Config)
    parallel = ParallelConfig(tensor=2, sequence=True)
    expected = {info.name: info.shape for info in section.parameters()}
    for held in run_ranks(2)(held_tensors, section, parallel):
        assert sorted(placement.name for placement in held) == sorted(expected)
        assert {placement.name: placement.shape for placement in held} == expected
