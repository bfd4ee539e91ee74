"""Repairs of megatron-core 0.16 where neither transformer-engine nor apex is installed.

Each repair says what goes wrong without it. On other versions nothing is touched: the tests of
these repairs show the defects on the bare package, and fail once a release has mended them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpotrain.engine.megatron.adam import counts_in_groups
from mpotrain.engine.state import fresh_adam_state

_WORLD_TENSORS = ("param", "exp_avg", "exp_avg_sq")


def is_affected() -> bool:
    """Return whether the installed megatron-core is a version that the repairs are meant for."""
    from megatron.core.package_info import __version__

    return str(__version__).split(".")[:2] == ["0", "16"]


def repair_modules() -> None:
    """Define what `moe_utils` reads and only transformer-engine provides.

    Without transformer-engine the router asks whether `te_general_gemm` is None, and the name does
    not exist: every mixture of experts dies with a NameError.
    """
    if not is_affected():
        return
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def repair_optimizer(optimizer: Any) -> None:
    """Mend how a distributed optimizer saves and loads its state, right after it was made.

    Args:
        optimizer: a `MegatronOptimizer`, chained or single; only distributed ones are changed, and
            those once.
    """
    if not is_affected():
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(single, DistributedOptimizer) or hasattr(single, "spreads_buckets"):
            continue
        single.__class__ = _with_padded_buckets(type(single))
        if _counts_per_parameter(single.optimizer):
            single.__class__ = _with_adam_state(type(single))


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer keeps the moments and the counter of Adam with each parameter."""
    return "betas" in inner.defaults and not counts_in_groups(inner)


def _with_padded_buckets(stock: Any) -> Any:
    """Derive a class that saves the right elements where a buffer has several padded buckets.

    For the format `fully_reshardable` the package gathers the state of a buffer without the padding
    between its buckets, and reads it at the places which parameters have with that padding: all
    parameters behind the first padding are saved with elements of their neighbours. Overlapped
    reduction makes such buckets.
    """

    class PaddedBuckets(stock):  # type: ignore[misc]
        spreads_buckets = False

        def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
            self.spreads_buckets = True
            try:
                return super().sharded_param_state_fully_reshardable(*args, **kwargs)
            finally:
                self.spreads_buckets = False

        def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
            state = super().get_parameter_state_dp_zero(*args, **kwargs)
            # Other formats are written and read without padding.
            if state is not None and self.spreads_buckets:
                for index, buffer in enumerate(self.buffers):
                    for tensors in state[index].values():
                        for name in _WORLD_TENSORS:
                            tensors[name] = _spread(tensors[name], buffer)
            return state

    return PaddedBuckets


def _spread(packed: Tensor, buffer: Any) -> Tensor:
    """Return the elements of a buffer's buckets at their offsets, with zeros between them.

    Args:
        packed: elements of all buckets without padding, one bucket behind the other.
        buffer: the `_ParamAndGradBuffer`.
    """
    padded = packed.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + size] = packed[start : start + size]
        start += size
    return padded


def _with_adam_state(stock: Any) -> Any:
    """Derive a class that handles the counter which AdamW and LAMB keep with each parameter.

    The package

    - takes the counter from the states and asserts that there is one: before the first step, and
      so at the start of every load, there is none (`state_dict`);
    - looks for it among the loaded tensors of each parameter, and dies with a KeyError:
      `fully_reshardable` keeps it once, with the groups (`_set_main_param_and_optimizer_states`);
    - hands one and the same tensor to all parameters at a load. Each of them counts a step on it,
      and the bias corrections of Adam go wrong without a word (`load_state_dict`).
    """

    class AdamState(stock):  # type: ignore[misc]
        def state_dict(self) -> Any:
            _begin_states(self.optimizer)
            if self.optimizer.state:
                return super().state_dict()
            # No element of any parameter fell to this rank. What it tells is not saved: the first
            # data-parallel rank, which always has some, writes the counter for all.
            nobody = "no parameter"
            self.optimizer.state[nobody] = {"step": torch.tensor(0.0)}
            try:
                return super().state_dict()
            finally:
                del self.optimizer.state[nobody]

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for state in self.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].clone()

        def _set_main_param_and_optimizer_states(
            self, model_param: Tensor, tensors: Mapping[str, Any]
        ) -> None:
            held = self._get_main_param_and_optimizer_states(model_param)
            super()._set_main_param_and_optimizer_states(model_param, {**held, **tensors})

    return AdamState


def _begin_states(inner: torch.optim.Optimizer) -> None:
    """Give parameters that have never been updated the state with which Adam begins."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state.get(parameter):
                inner.state[parameter] = fresh_adam_state(group, parameter, 0)
