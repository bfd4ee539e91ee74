"""A handful of parameters under megatron-core's distributed optimizer, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpotrain.engine.megatron import fixes
from mpotrain.parallel.ranks import World

SHAPES = ((5,), (3, 7), (11,), (2, 3), (70,), (13,))
"""Odd sizes: core starts each parameter on a multiple of 64 elements and fills buckets up."""
LR = 0.05


def bare(optimizer: Any, *methods: str) -> None:
    """Take repairs of single methods back."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for single in optimizer.chained_optimizers:
        for name in methods:
            setattr(single, name, MethodType(getattr(DistributedOptimizer, name), single))


class Trained:
    """A handful of parameters behind core's wrapper, with core's distributed optimizer."""

    def __init__(
        self,
        world: World,
        *,
        repair: bool = True,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import MegatronModule

        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            use_cpu_initialization=True,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
        )
        self.world, self.module = world, MegatronModule(config)
        generator = torch.Generator().manual_seed(1)
        for number, shape in enumerate(shapes):
            values = torch.randn(shape, generator=generator).to(dtype)
            self.module.register_parameter(f"p{number}", nn.Parameter(values))
        self.module.forward = self._loss
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            grad_reduce_in_fp32=True,
            bucket_size=20,
        )
        self.wrapped = DistributedDataParallel(config, settings, self.module)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LR,
                weight_decay=0.01,
                clip_grad=0.0,
                use_distributed_optimizer=True,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
            ),
            [self.wrapped],
            use_gloo_process_groups=False,
        )
        for single in self.optimizer.chained_optimizers:
            # Core gathers states with gloo, and here the ordinary groups are of gloo.
            single.data_parallel_group_gloo = single.data_parallel_group
        if repair:
            fixes.repair_optimizer(self.optimizer)

    def _loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + 2 * step + self.world.rank)
        total = torch.zeros(())
        for parameter in self.module.parameters():
            x = torch.randn(parameter.shape, generator=generator)
            total = total + ((parameter.float() - x) ** 2 * (1 + x.abs())).sum()
        return total

    def advance(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            self.wrapped(step).backward()
            self.wrapped.finish_grad_sync()
            done, _, _ = self.optimizer.step()
            assert done

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.module.parameters()]

    def sharded(self, *, is_loading: bool = False) -> Any:
        from megatron.core import parallel_state

        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self.module.sharded_state_dict(metadata=metadata)
        return self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)

    def saved(self) -> Any:
        """What a checkpoint in `fully_reshardable` holds of weights and optimizer."""
        state = {"optimizer": self.sharded(), "weights": self.weights()}
        common = [copy.deepcopy(plain(state))]
        dist.broadcast_object_list(common, 0)  # dist_checkpointing keeps what rank 0 tells
        return common[0]

    def load(self, saved: Any) -> None:
        wanted = keys(self.sharded(is_loading=True))
        assert wanted == tree_keys(saved["optimizer"])
        for parameter, value in zip(self.module.parameters(), saved["weights"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))

    def moments(self) -> dict[str, list[float]]:
        """What `saved` says of the moments, by name of the parameter."""
        return {
            str(number): [value.tolist() for value in tensors.values()]
            for number, tensors in self.saved()["optimizer"]["param_state"].items()
        }


def plain(tree: Any) -> Any:
    """Replace sharded tensors, which hold whole ones here, by their values."""
    from megatron.core.dist_checkpointing import ShardedTensor

    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tree.data.clone() if isinstance(tree, ShardedTensor) else tree


def keys(tree: Any) -> list[str]:
    from megatron.core.dist_checkpointing import ShardedTensor

    return [
        f"{number}.{name}"
        for number, tensors in tree["param_state"].items()
        for name, tensor in tensors.items()
        if isinstance(tensor, ShardedTensor)
    ]


def tree_keys(tree: Any) -> list[str]:
    return [f"{n}.{name}" for n, tensors in tree["param_state"].items() for name in tensors]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(a, b, strict=True))
