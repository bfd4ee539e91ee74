"""Megatron-core on the CPU: its collectives, a stock network, and other engines after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import engines
from distributed.engines import deepspeed_engine, run_steps, same_bits, whole_state
from distributed.megatron_grid import megatron_grid
from torch import Tensor

from mpotrain.engine.megatron import cpu
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim rests where CUDA is")


def rows(rank: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def uneven_gather(world: World, sizes: list[int]) -> None:
    with megatron_grid(world, ParallelConfig(tensor=world.size)):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        group = parallel_state.get_tensor_model_parallel_group()
        own = rows(world.rank, sizes[world.rank]).requires_grad_()
        whole = gather_from_sequence_parallel_region(
            own, group=group, tensor_parallel_output_grad=True, output_split_sizes=sizes
        )
        parts = [rows(rank, size) for rank, size in enumerate(sizes)]
        assert torch.equal(whole.detach(), torch.cat(parts))
        # Backward is a reduce-scatter: every rank weighs all rows by its own number.
        (whole**2 * (1 + world.rank)).sum().backward()
        assert own.grad is not None
        factor = sum(1 + rank for rank in range(world.size))
        assert torch.allclose(own.grad, 2 * factor * own.detach(), rtol=1e-14, atol=0)


def uneven_scatter(world: World, sizes: list[int]) -> None:
    with megatron_grid(world, ParallelConfig(tensor=world.size)):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region

        group = parallel_state.get_tensor_model_parallel_group()
        start = sum(sizes[: world.rank])
        mine = slice(start, start + sizes[world.rank])
        given = rows(10 + world.rank, sum(sizes)).requires_grad_()
        part = reduce_scatter_to_sequence_parallel_region(
            given, group=group, input_split_sizes=sizes
        )
        wanted = sum(rows(10 + rank, sum(sizes))[mine] for rank in range(world.size))
        assert torch.allclose(part.detach(), wanted, rtol=1e-14, atol=0)
        assert torch.equal(given.detach(), rows(10 + world.rank, sum(sizes)))
        (part * (1 + world.rank)).sum().backward()
        weights = torch.cat([torch.full((n, 3), 1.0 + rank) for rank, n in enumerate(sizes)])
        assert given.grad is not None
        assert torch.equal(given.grad, weights.double())


def even_parts(world: World) -> None:
    """Parts of one size take megatron-core's own way."""
    with megatron_grid(world, ParallelConfig(tensor=world.size)):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import mappings

        group = parallel_state.get_tensor_model_parallel_group()
        whole = mappings._gather_along_first_dim(rows(world.rank, 2), group)
        assert torch.equal(whole, torch.cat([rows(rank, 2) for rank in range(world.size)]))
        part = mappings._reduce_scatter_along_first_dim(whole, group)
        assert torch.allclose(part, world.size * rows(world.rank, 2), rtol=1e-14, atol=0)


@pytest.mark.parametrize("sizes", [[1, 4], [5, 2], [0, 3], [2, 2]])
def test_collectives_with_unequal_parts(run_ranks: Any, sizes: list[int]) -> None:
    run_ranks(2)(uneven_gather, sizes)
    run_ranks(2)(uneven_scatter, sizes)


def test_collectives_with_equal_parts(run_ranks: Any) -> None:
    run_ranks(2)(even_parts)


def stock_uneven_gather(world: World) -> None:
    assert cpu.install()
    cpu.uninstall()
    from megatron.core.tensor_parallel import mappings

    received = [torch.empty(1, 3), torch.empty(4, 3)]
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape|gloo|Gloo"):
        dist.all_gather(received, torch.zeros(1 if world.rank == 0 else 4, 3))
    assert mappings._gather_along_first_dim.__module__ == mappings.__name__


def test_gloo_still_lacks_them(run_ranks: Any) -> None:
    """If this fails, gloo has learnt it and cpu_collectives.py can go."""
    run_ranks(2)(stock_uneven_gather)


VOCABULARY, LENGTH, BATCH = 32, 6, 2


def stock_network(parallel: ParallelConfig, **settings: Any) -> Any:
    """A GPT of megatron-core itself with its own layers; layers' weights from the seed alone."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor,
        hidden_dropout=settings.get("dropout", 0.0),
        attention_dropout=settings.get("dropout", 0.0),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        **settings.get("config", {}),
    )
    torch.manual_seed(3)
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=True,
    )


def stock_loss(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    loss: Tensor = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:])
    return loss.sum()


def square_of_gradients(model: Any) -> Tensor:
    """Sum of squares of this rank's share of the gradients: replicated ones count on rank 0."""
    total = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        if is_cut or dist.get_rank() == 0:
            total += parameter.grad.double().square().sum()
    dist.all_reduce(total)
    return total


def stock_step(world: World, settings: dict[str, Any]) -> tuple[float, float]:
    parallel = ParallelConfig(tensor=world.size)
    with megatron_grid(world, parallel):
        model = stock_network(parallel, **settings)
        loss = stock_loss(model)
        loss.backward()
        return float(loss.detach()), float(square_of_gradients(model))


RECOMPUTED = {
    "config": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
}


@pytest.mark.parametrize("settings", [{}, RECOMPUTED], ids=["plain", "recomputed"])
def test_a_stock_network_cut_over_two_ranks(run_ranks: Any, settings: dict[str, Any]) -> None:
    ((loss, square),) = run_ranks(1)(stock_step, {})
    for other_loss, other_square in run_ranks(2)(stock_step, settings):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_square == pytest.approx(square, rel=1e-5)
    assert square > 1


def test_recomputed_dropout_of_cut_layers(run_ranks: Any) -> None:
    """Recomputation must find the states of both random streams again."""
    plain = run_ranks(2)(stock_step, {"dropout": 0.3})
    recomputed = run_ranks(2)(stock_step, {"dropout": 0.3, **RECOMPUTED})
    assert plain == recomputed
    assert plain[0] != run_ranks(2)(stock_step, {})[0]


def around_a_shim(world: World) -> None:
    """DeepSpeed before, after a session of the shim, and after a second one."""

    def history() -> tuple[list[float], engines.State]:
        engine = deepspeed_engine(world, engines.zero(2), dropout=0.1)
        losses = [result.loss for result in run_steps(engine, 0, 2)]
        state = whole_state(engine)
        engine.close()
        return losses, state

    losses, state = history()
    for _ in range(2):
        with megatron_grid(world, ParallelConfig(tensor=world.size)):
            stock_loss(stock_network(ParallelConfig(tensor=world.size))).backward()
        assert torch._C._len_torch_function_stack() == 0
        assert torch.zeros(1).type() == "torch.FloatTensor"
        again_losses, again_state = history()
        assert again_losses == losses
        assert same_bits(again_state, state)


def test_other_engines_are_unharmed(run_ranks: Any) -> None:
    run_ranks(2)(around_a_shim)
