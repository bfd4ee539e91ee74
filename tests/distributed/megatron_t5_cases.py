"""Small T5s of the Megatron engine beside the local T5 with the same weights, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.megatron_grid import megatron_grid
from torch import Tensor

from mpotrain.batch import Batch
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config, T5Sites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.nn.roles import Role
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World
from mpotrain.tensor.cached import StepCache

VOCABULARY, SOURCE, TARGET, ROWS = 41, 8, 6, 2
ONE = ParallelConfig()
TENSOR = ParallelConfig(tensor=2)
SEQUENCE = ParallelConfig(tensor=2, sequence=True)

PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "head_size": 6, "num_layers": 1,
    "num_decoder_layers": 2, "num_heads": 4, "ffn_size": 32, "relative_buckets": 8,
    "relative_distance": 6, "dropout": 0.0,
}  # fmt: skip
"""Heads do not make up the hidden size, an odd vocabulary, a decoder deeper than the encoder."""
DENSE = T5Config(**PLAIN)
TENSORIZED = T5Config(
    **PLAIN,
    activation_checkpointing=True,
    sites=T5Sites(
        # The larger core is cut, by a period of two heads: a rank holds every other head.
        query=MPOSite(in_modes=(4, 4), out_modes=(2, 12)),
        key=MPOSite(in_modes=(4, 4), out_modes=(2, 12), cap=7),
        attention_out=MPOSite(in_modes=(2, 12), out_modes=(4, 4)),
        c_fc=MPOSite(in_modes=(4, 2, 2), out_modes=(4, 4, 2), cap=7),
    ),
)
MPO_MOE = T5Config(
    **PLAIN,
    moe=MoEConfig(
        num_experts=4,
        router=RouterConfig(top_k=2, z_loss=1e-3),
        c_fc=MPOExpertSite(start="independent", in_modes=(2, 4, 2), out_modes=(4, 4, 2)),
        c_proj=MPOExpertSite(start="independent", in_modes=(4, 4, 2), out_modes=(2, 2, 4), cap=6),
    ),
)
DENSE_MOE = T5Config(
    **PLAIN,
    activation_checkpointing=True,
    moe=MoEConfig(
        num_experts=4,
        every=1,
        c_fc=DenseExpertSite(),
        c_proj=AsymmetricExpertSite(
            start="independent", in_mode=8, out_mode=4, in_bond=4, out_bond=4
        ),
    ),
)
SECTIONS = {"dense": DENSE, "mpo": TENSORIZED, "mpo-moe": MPO_MOE, "dense-moe": DENSE_MOE}


@dataclass(frozen=True)
class Task:
    """What the ranks compute, and how."""

    section: T5Config
    parallel: ParallelConfig
    packed: bool = True
    training: bool = True
    num_micros: int = 1
    first_batch: int = 0
    is_cached: bool = False
    dtype: torch.dtype = torch.float64

    def batch(self, slot: int, data_rank: int) -> Batch:
        return batch_of(self.first_batch + 10 * slot + data_rank, packed=self.packed)


@dataclass
class Outcome:
    """What one rank found: losses, statistics, and its part of every gradient."""

    losses: list[float]
    sums: list[dict[str, Tensor]]
    told: list[dict[str, dict[str, Tensor]]]
    gradients: list[tuple[Any, Tensor]]


def batch_of(number: int, *, packed: bool, source: int = SOURCE, target: int = TARGET) -> Batch:
    """Rows of two documents, which count different numbers of targets."""
    draws = torch.Generator().manual_seed(9_000 + number)
    tokens = torch.randint(VOCABULARY, (ROWS, target + 1), generator=draws)
    counts = torch.rand(ROWS, target, generator=draws) > 0.3
    # What is not to be predicted has no token, or one that is easily predicted.
    targets = torch.where(counts, tokens[:, 1:], tokens[:, :-1])
    targets[0, ~counts[0]] = -100
    ends, source_ends = (torch.randint(1, n, (ROWS, 1), generator=draws) for n in (target, source))
    return Batch(
        inputs=tokens[:, :-1],
        targets=targets,
        loss_mask=counts,
        sample_ids=torch.arange(ROWS),
        encoder_inputs=torch.randint(VOCABULARY, (ROWS, source), generator=draws),
        document_ids=1 + (torch.arange(target) >= ends).long() if packed else None,
        encoder_document_ids=1 + (torch.arange(source) >= source_ends).long() if packed else None,
    )


@contextmanager
def float_means_double() -> Iterator[None]:
    """Leave float64 as it is where the networks compute in fp32 whatever they are given."""
    original = Tensor.float
    Tensor.float = lambda x: x if x.dtype == torch.float64 else original(x)  # type: ignore
    try:
        yield
    finally:
        Tensor.float = original  # type: ignore[method-assign]


def local_t5(section: T5Config) -> T5:
    """The reference, every weight away from its start value."""
    model = T5(section, seed=3, compute_dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).double())
    return model


def build(
    section: T5Config,
    parallel: ParallelConfig,
    cache: StepCache | None = None,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A chunk with the weights of `local_t5`."""
    from mpotrain.engine.megatron.placement import placement_of

    chunk = empty_chunk(section, parallel, torch.device("cpu"), dtype, cache)
    whole = dict(local_t5(section).named_parameters())
    with torch.no_grad():
        for parameter in chunk.parameters():
            placement = placement_of(parameter)
            parameter.copy_(placement.take(whole[placement.name]))
    return chunk


def empty_chunk(
    section: T5Config,
    parallel: ParallelConfig,
    device: torch.device,
    dtype: torch.dtype,
    cache: StepCache | None = None,
) -> Any:
    from mpotrain.engine.megatron.config import MegatronConfig
    from mpotrain.engine.megatron.seq2seq import build_t5
    from mpotrain.engine.megatron.settings import transformer_config
    from mpotrain.engine.megatron.slots import Slots, Whole

    config = transformer_config(section, MegatronConfig(), parallel, on_cuda=False)
    config = replace(config, params_dtype=dtype, pipeline_dtype=dtype)
    wholes = {p.name: Whole(p.shape, Role(p.role), p.num_experts) for p in section.parameters()}
    return build_t5(section, config, Slots(wholes, device=device, dtype=dtype), cache=cache)


def micro_of(batch: Batch, slot: int, num_micros: int) -> Any:
    from mpotrain.engine.megatron.micro import Micro, Tally

    return Micro(
        slot=slot,
        is_last=slot == num_micros - 1,
        loss_scale=1.0,
        auxiliary_scale=batch.num_tokens,
        tally=Tally(),
    )


def compute(world: World, task: Task) -> Outcome:
    """Forward and backward passes of this rank's micro-batches, gradients summed over ranks."""
    with megatron_grid(world, task.parallel), float_means_double():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(5)
        cache = StepCache() if task.is_cached else None
        chunk = build(task.section, task.parallel, cache, task.dtype).train(task.training)
        outcome = Outcome([], [], [], [])
        with nullcontext() if cache is None else cache.step(task.num_micros):
            for slot in range(task.num_micros):
                batch = task.batch(slot, parallel_state.get_data_parallel_rank())
                micro = micro_of(batch, slot, task.num_micros)
                with torch.set_grad_enabled(task.training):
                    objective = chunk(batch, micro)
                micro.tally.is_open = False
                if task.training:
                    objective.backward()
                outcome.losses.append(objective.item())
                outcome.sums.append(micro.tally.sums)
                outcome.told.append({name: dict(told) for name, told in micro.tally.told.items()})
        if task.training:
            outcome.gradients = reduced_gradients(chunk)
        return outcome


def reduced_gradients(chunk: Any) -> list[tuple[Any, Tensor]]:
    """This rank's part of every gradient, as the engine sums it over ranks."""
    from megatron.core import parallel_state

    from mpotrain.engine.megatron.placement import placement_of

    found = []
    for parameter in chunk.parameters():
        placement = placement_of(parameter)
        assert parameter.grad is not None, placement.name
        grad = parameter.grad.contiguous()
        if placement.is_expert:
            dist.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group())
        else:
            dist.all_reduce(grad, group=parallel_state.get_data_parallel_group())
        if placement.is_partial:
            dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        found.append((placement, grad))
    return found


def whole_gradients(outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """Put the parts of all ranks together; where several ranks hold the same, it is the same."""
    wholes: dict[str, Tensor] = {}
    for outcome in outcomes:
        for placement, grad in outcome.gradients:
            missing = torch.full(placement.shape, torch.nan, dtype=grad.dtype)
            whole = wholes.setdefault(placement.name, missing)
            known = placement.take(whole)
            # Rows of padding have no place in the whole tensor; they read as zeros.
            assert torch.allclose(
                torch.where(known.isnan(), grad, known), grad, rtol=1e-9, atol=1e-12
            ), placement.name
            placement.put(whole, grad)
    assert not any(whole.isnan().any() for whole in wholes.values())
    return wholes


def reference(task: Task, data_ranks: int) -> tuple[T5, dict[tuple[int, int], Any]]:
    """The local network: what it returns for each (slot, data rank), and all gradients."""
    model = local_t5(task.section).train(task.training)
    outputs = {}
    with float_means_double(), torch.set_grad_enabled(task.training):
        for slot in range(task.num_micros):
            for rank in range(data_ranks):
                output = model(task.batch(slot, rank))
                outputs[slot, rank] = output
                if task.training:
                    output.objective.backward()
    return model, outputs


def assert_equal_to_local(outcomes: list[Outcome], task: Task) -> T5:
    data_ranks = len(outcomes) // task.parallel.model_ranks
    model, outputs = reference(task, data_ranks)
    mixtures = task.section.mixtures()
    for rank, outcome in enumerate(outcomes):
        for slot in range(task.num_micros):
            expected = outputs[slot, rank // task.parallel.tensor]
            loss = expected.loss_sum.item()
            assert outcome.losses[slot] == pytest.approx(loss, rel=1e-11)
            sums = outcome.sums[slot]
            assert sums.keys() == ({"loss_sum"} if task.training else {"loss_sum", "correct"})
            assert sums["loss_sum"].item() == pytest.approx(loss, rel=1e-11)
            if not task.training:
                assert sums["correct"] == expected.statistics["correct"]
            told = outcome.told[slot]
            assert sorted(told) == sorted(mixtures)
            for name in told[mixtures[0]] if mixtures else ():
                stacked = torch.stack([told[mixture][name] for mixture in mixtures])
                torch.testing.assert_close(
                    stacked, expected.statistics[name], rtol=1e-9, atol=1e-12, check_dtype=False
                )
    if task.training:
        found = whole_gradients(outcomes)
        wanted = {name: p.grad for name, p in model.named_parameters()}
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert grad is not None, name
            assert grad.abs().max() > 1e-8, name
            error = (found[name] - grad).abs().max() / grad.abs().max()
            assert error < 1e-10, (name, error)
    return model
