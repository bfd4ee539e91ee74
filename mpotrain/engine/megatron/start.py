"""Starts megatron-core's process groups and random streams, and ends them."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mpotrain.parallel.plan import ParallelConfig


def start_megatron(parallel: ParallelConfig, seed: int = 1) -> None:
    """Build all process groups for the degrees (collective).

    Args:
        parallel: the degrees; they divide the world.
        seed: of the random streams, until a step sets its own.
    """
    virtual = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed)


def stop_megatron() -> None:
    """Give the groups back; the world stays."""
    parallel_state.destroy_model_parallel()
