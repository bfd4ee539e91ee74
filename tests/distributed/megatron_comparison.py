"""Parts of the Megatron engine beside local modules with the same weights, on every rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpotrain.parallel.plan import ParallelConfig

DOUBLE = torch.float64


def draw(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(
        dtype
    )


def redraw(module: nn.Module, std: float = 0.4) -> nn.Module:
    """Give every parameter, biases and gains too, values of its own in float64."""
    module.to(DOUBLE)
    with torch.no_grad():
        for n, parameter in enumerate(module.parameters()):
            parameter.copy_(std * draw(*parameter.shape, seed=1000 + n) + 0.1)
    return module


def make_config(parallel: ParallelConfig, **given: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    sizes: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 8,
        "ffn_hidden_size": 24,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": DOUBLE,
        **given,
    }
    return TransformerConfig(
        **sizes,
        perform_initialization=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        context_parallel_size=parallel.context,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        cuda_graph_scope=[],
    )


def make_slots(
    tensors: Mapping[str, Tensor], *, shared: Collection[str] = (), dtype: torch.dtype = DOUBLE
) -> Any:
    from mpotrain.engine.megatron.slots import Slots, Whole
    from mpotrain.nn.roles import Role

    wholes = {name: Whole(tuple(t.shape), Role.DENSE) for name, t in tensors.items()}
    return Slots(wholes, shared=shared, device=torch.device("cpu"), dtype=dtype)


def make_micro(**given: Any) -> Any:
    from mpotrain.engine.megatron.micro import Micro, Tally

    return Micro(slot=0, is_last=True, loss_scale=1.0, auxiliary_scale=1.0, tally=Tally(), **given)


def linear_source(
    slots: Any, name: str, sizes: tuple[int, int], period: int, *, bias: bool = True
) -> Any:
    """Return the source of a dense layer with the names of `nn.Linear`."""
    from mpotrain.engine.megatron.sources import LinearSource
    from mpotrain.models.sites import Site
    from mpotrain.nn.config import DenseSite

    site = Site(name, "matrix", *sizes, DenseSite(), None, bias)
    return LinearSource(slots, site, period, bias=f"{name}.bias" if bias else None)


def document_ids(batch: int, length: int) -> Tensor:
    """Return ids of documents of different lengths, with padding (0) at the end of some rows."""
    cuts = draw(batch, length, seed=77) > 0.8
    ids = 1 + cuts.cumsum(-1)
    ids[0, -2:] = 0
    return ids


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give every parameter its part of the tensor of its logical name."""
    from mpotrain.engine.megatron.placement import placement_of

    with torch.no_grad():
        for parameter in module.parameters():
            placement = placement_of(parameter)
            parameter.copy_(placement.take(tensors[placement.name]))


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the whole gradient of every logical tensor, put together over the ranks.

    Gradients that are neither cut nor partial must be the same on all tensor-parallel ranks.
    """
    from megatron.core import parallel_state

    from mpotrain.engine.megatron.placement import placement_of

    tensor_group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for parameter in module.parameters():
        placement = placement_of(parameter)
        assert parameter.grad is not None, placement.name
        grad = parameter.grad.clone()
        if placement.is_expert:
            dist.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group())
        else:
            dist.all_reduce(grad, group=parallel_state.get_context_parallel_group())
        if placement.is_partial:
            dist.all_reduce(grad, group=tensor_group)
        whole = grad.new_zeros(placement.shape)
        placement.put(whole, grad)
        if placement.cuts:
            dist.all_reduce(whole, group=tensor_group)
        else:
            alike = [torch.empty_like(whole) for _ in range(tensor_group.size())]
            dist.all_gather(alike, whole, group=tensor_group)
            assert all(torch.allclose(other, whole, atol=1e-12) for other in alike)
        found[placement.name] = whole
    return found


def difference(found: Tensor, expected: Tensor, least: float = 1e-300) -> float:
    """Return the largest difference of two tensors in units of the largest expected value.

    Args:
        found: one tensor.
        expected: the other.
        least: unit where expected values are smaller.
    """
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(least))


def differences(found: Mapping[str, Tensor], local: nn.Module) -> dict[str, float]:
    """Return the difference of the gradient of every parameter of a local module."""
    expected = {name: p.grad for name, p in local.named_parameters() if p.grad is not None}
    assert found.keys() == dict(local.named_parameters()).keys() == expected.keys()
    # That of the biases of keys is zero but for rounding: a softmax does not feel them.
    least = 1e-3 * max(float(grad.abs().max()) for grad in expected.values())
    return {name: difference(found[name], grad, least) for name, grad in expected.items()}


class Sequences:
    """Brings whole sequences to what a rank holds of them, and back, with exact gradients."""

    def __init__(self, parallel: ParallelConfig) -> None:
        from megatron.core import parallel_state

        self.parallel = parallel
        self.rank = parallel_state.get_context_parallel_rank()
        self.is_split = parallel.sequence and parallel.tensor > 1

    def positions(self, length: int) -> Tensor:
        from mpotrain.engine.megatron.micro import positions_of_rank

        return positions_of_rank(length, self.parallel.context, self.rank)

    def mine(self, x: Tensor) -> Tensor:
        """Return this context-parallel rank's positions of x (B, T, H), as (t, B, H)."""
        return x[:, self.positions(x.shape[1])].transpose(0, 1).contiguous()

    def enter(self, mine: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

        return scatter_to_sequence_parallel_region(mine) if self.is_split else mine

    def leave(self, y: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        if not self.is_split:
            return y
        return gather_from_sequence_parallel_region(y, tensor_parallel_output_grad=False)
