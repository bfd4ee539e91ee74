"""Starts megatron-core's process groups and random streams, and ends them."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mpotrain.errors import ParallelError
from mpotrain.parallel.plan import ParallelConfig

_started: list[ParallelConfig] = []
"""Degrees of the engines that live in this process: megatron-core has one set of groups."""


def start_megatron(parallel: ParallelConfig, seed: int = 1) -> None:
    """Build all process groups for the degrees (collective).

    Args:
        parallel: the degrees; they divide the world.
        seed: of the random streams, until a step sets its own.

    Raises:
        ParallelError: another engine of this process has other degrees.
    """
    if _started and _started[-1] != parallel:
        raise ParallelError(
            f"an engine with {_started[-1]} lives in this process, and megatron-core has one set "
            f"of groups: close it before one with {parallel} is built"
        )
    if not _started:
        try:
            _initialize(parallel)
        except BaseException:
            _destroy()
            raise
    _started.append(parallel)
    model_parallel_cuda_manual_seed(seed)


def stop_megatron() -> None:
    """Let the groups go with the last engine that uses them; the world stays."""
    _started.pop()
    if not _started:
        _destroy()


def _destroy() -> None:
    # `destroy_model_parallel` forgets the groups and leaves their threads and connections alive.
    groups = parallel_state._global_process_group_list or []
    for group in reversed(groups):
        if group is not None:  # None is the world
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def _initialize(parallel: ParallelConfig) -> None:
    virtual = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # Twins of the data-parallel groups, for checkpoints of megatron-core's own.
        create_gloo_process_groups=False,
    )
