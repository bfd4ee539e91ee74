"""Megatron-core's optimizers over this rank's parameters, and where their master weights lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MixedPrecisionOptimizer,
)
from torch import Tensor, nn

from mpotrain.engine.fragment import Fragment
from mpotrain.engine.megatron.adam import build_inner
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.fixes import repair_optimizer
from mpotrain.engine.megatron.placement import Placement, placement_of


@dataclass(frozen=True)
class Master:
    """The fp32 elements of a parameter that this rank updates.

    Attributes:
        parameter: what the network computes with.
        placement: which part of which logical tensor it is.
        main: tensor that the inner optimizer updates.
        start: its first element in the flattened parameter.
        optimizer: the inner optimizer.
        chunk: number of the chunk on this rank.
    """

    parameter: nn.Parameter
    placement: Placement
    main: Tensor
    start: int
    optimizer: torch.optim.Optimizer
    chunk: int

    @property
    def gradient(self) -> Tensor:
        """The summed gradient of these elements, once it was brought here.

        Raises:
            RuntimeError: it was not.
        """
        if self.main.grad is None:
            raise RuntimeError(f"{self.placement.name}: no gradient has come to its master")
        return self.main.grad

    def fragment(self) -> Fragment:
        """Return it as a part of the logical tensor; `start` counts in the rank's own part."""

        def part(flat: Tensor) -> Tensor:
            whole = flat.view(self.placement.shape)
            return self.placement.take(whole).reshape(-1)

        return Fragment(self.start, self.main.numel(), self.main, 0, part)


def mark_for_core(chunk: nn.Module, *, is_split: bool) -> None:
    """Set what megatron-core's wrappers and schedules read from a chunk and its parameters.

    Args:
        chunk: before it is wrapped.
        is_split: whether the distributed optimizer is on.
    """
    # Schedules no longer know of a network with two stacks on several stages.
    chunk.model_type = ModelType.encoder_or_decoder
    # Gradients of copies are summed by `Reductions`, those of the tied matrix of tokens too.
    chunk.share_embeddings_and_output_weights = False  # type: ignore[assignment]
    for parameter in chunk.parameters():
        placement = placement_of(parameter)
        parameter.allreduce = not placement.is_expert  # type: ignore[attr-defined]
        if placement.is_shared and is_split:
            # A bucket of its own, so that all stages split it over their ranks alike: only then
            # do sums over stages add the same elements.
            parameter.shared_embedding = True  # type: ignore[attr-defined]


class Optimizers:
    """One optimizer for dense parameters and one for those of experts.

    Attributes:
        core: megatron-core's optimizers.
        masters: what this rank updates, in the order of chunks and parameters.
    """

    def __init__(
        self,
        reference: torch.optim.Optimizer,
        names: Mapping[int, str],
        chunks: Sequence[DistributedDataParallel],
        config: MegatronConfig,
    ) -> None:
        """Build them like an optimizer of the whole network.

        Args:
            reference: optimizer over whole parameters; its class and groups are taken over, or
                those of a fused Adam that updates as it does.
            names: logical names of the reference's parameters by their id.
            chunks: of this rank, wrapped.
            config: the engine section.
        """
        self._config, self._chunks = config, list(chunks)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            clip_grad=0.0,
            bf16=config.dtype == "bf16",
            params_dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
            use_distributed_optimizer=config.distributed_optimizer,
            overlap_param_gather=config.overlap_param_gather,
        )
        self.core: list[Any] = []
        self.masters: list[Master] = []
        for is_expert in (False, True):
            groups = self._groups(reference, names, is_expert=is_expert)
            if any(group["params"] for group in groups):
                inner = build_inner(reference, groups, config.extensions)
                optimizer = self._wrap(inner, settings, is_expert=is_expert)
                repair_optimizer(optimizer)
                self.core.append(optimizer)
                self.masters += self._find_masters(optimizer, inner, is_expert=is_expert)

    @property
    def inner(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers inside."""
        return [optimizer.optimizer for optimizer in self.core]

    def prepare_gradients(self) -> None:
        """Bring summed gradients to the masters, as `main.grad`."""
        for optimizer in self.core:
            optimizer.prepare_grads()

    def update(self) -> None:
        """Update the masters, and bring them to the parameters of all data-parallel ranks."""
        for number, optimizer in enumerate(self.core, start=1):
            if self._config.distributed_optimizer and number < len(self.core):
                # Without the gathering of weights behind it, which is of all parameters: once.
                MixedPrecisionOptimizer.step_with_ready_grads(optimizer)
            else:
                optimizer.step_with_ready_grads()

    def zero_gradients(self) -> None:
        """Forget all gradients."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        for optimizer in self.core:
            optimizer.zero_grad()

    def _groups(
        self, reference: torch.optim.Optimizer, names: Mapping[int, str], *, is_expert: bool
    ) -> list[dict[str, Any]]:
        held: dict[str, list[nn.Parameter]] = {}
        for chunk in self._chunks:
            for parameter in chunk.parameters():
                placement = placement_of(parameter)
                if placement.is_expert == is_expert:
                    held.setdefault(placement.name, []).append(parameter)
        groups = []
        for group in reference.param_groups:
            members = [p for w in group["params"] for p in held.get(names[id(w)], ())]
            # The rest is what megatron-core's optimizers expect in a group.
            core = {"is_expert_parallel": is_expert, "wd_mult": 1.0, "lr_mult": 1.0}
            groups.append({**group, **core, "params": members})
        return groups

    def _wrap(
        self, inner: torch.optim.Optimizer, settings: OptimizerConfig, *, is_expert: bool
    ) -> Any:
        if self._config.distributed_optimizer:
            group = (
                parallel_state.get_expert_data_parallel_group()
                if is_expert
                else parallel_state.get_data_parallel_group(with_context_parallel=True)
            )
            attribute = "expert_parallel_buffers" if is_expert else "buffers"
            return DistributedOptimizer(
                inner,
                settings,
                None,
                _no_state,
                model_chunks=self._chunks,
                per_model_buffers={
                    n: getattr(chunk, attribute) for n, chunk in enumerate(self._chunks)
                },
                data_parallel_group=group,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=torch.distributed.get_rank(
                    parallel_state.get_model_parallel_group()
                ),
                distributed_optimizer_instance_id=0,
            )
        if settings.bf16:
            return Float16OptimizerWithFloat16Params(inner, settings, None, _no_state)
        return FP32Optimizer(inner, settings, _no_state)

    def _find_masters(
        self, core: Any, inner: torch.optim.Optimizer, *, is_expert: bool
    ) -> list[Master]:
        mains = _split_mains(core) if self._config.distributed_optimizer else None
        found = []
        for number, chunk in enumerate(self._chunks):
            for parameter in chunk.parameters():
                placement = placement_of(parameter)
                if placement.is_expert != is_expert:
                    continue
                start, main = 0, getattr(parameter, "main_param", parameter)
                if mains is not None:
                    if id(parameter) not in mains:
                        continue  # other data-parallel ranks update all of it
                    start, main = mains[id(parameter)]
                found.append(Master(parameter, placement, main, start, inner, number))
        return found


def _split_mains(core: Any) -> dict[int, tuple[int, Tensor]]:
    """Return the part that this rank updates of each parameter of a distributed optimizer."""
    pairs = [
        *zip(core.model_fp32_groups, core.shard_fp32_groups, strict=True),
        *zip(core.model_float16_groups, core.shard_fp32_from_float16_groups, strict=True),
    ]
    found = {}
    for models, shards in pairs:
        for model, shard in zip(models, shards, strict=True):
            found[id(model)] = (core._get_model_param_range_map(model)["param"].start, shard)
    return found


def _no_state(*_: Any) -> None:
    """Leave the state of an inner optimizer to itself and to `import_state`."""
