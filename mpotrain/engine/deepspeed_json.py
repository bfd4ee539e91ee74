"""The DeepSpeed JSON, generated: every default that matters is written out.

DeepSpeed's defaults change between releases (gradient_clipping became 1.0 in 2026), and what a
default does is nowhere in the run folder. Nothing here is left to them.
"""

from __future__ import annotations

from typing import Any

from mpotrain.engine.config import DeepSpeedConfig

UNLIMITED = 2**62
"""Stands for "no limit" where DeepSpeed wants a number."""


def deepspeed_json(
    config: DeepSpeedConfig,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    accumulation: int,
    on_cuda: bool,
) -> dict[str, Any]:
    """Return the configuration that `deepspeed.initialize` gets.

    Args:
        config: the engine section.
        global_batch_size: sequences in a step, over all ranks.
        micro_batch_size: sequences in a forward pass.
        accumulation: micro-batches in a step on each rank.
        on_cuda: whether ranks compute on CUDA (pinned memory, streams).

    Returns:
        A JSON document. It names no optimizer and no scheduler (ours are passed as objects): an
        optimizer named here would be compiled at run time.
    """
    return {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "managed_gradient_accumulation": True,
        # Clipping is done at the optimizer's gate, with a norm that is right in every stage.
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": config.reduce_dtype,
        "fp16": {"enabled": False},
        "bf16": {
            "enabled": config.dtype == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": []},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_section(config, on_cuda),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _zero_section(config: DeepSpeedConfig, on_cuda: bool) -> dict[str, Any]:
    # Stage 1 reduces once per step, after backward: there is nothing to overlap with.
    overlap = config.overlap_communication and config.zero_stage >= 2
    section: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": config.reduce_bucket_elements,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "allgather_bucket_size": config.gather_bucket_elements,
        "overlap_comm": overlap,
        "compute_grad_norm": True,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "ignore_unused_parameters": True,
        "sub_group_size": 1_000_000_000,
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": config.prefetch_elements,
        "stage3_param_persistence_threshold": config.persistence_threshold,
        "stage3_model_persistence_threshold": UNLIMITED,
        "stage3_max_live_parameters": config.max_live_elements,
        "stage3_max_reuse_distance": config.max_live_elements,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_module_granularity_threshold": 0,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "log_trace_cache_warnings": False,
    }
    if config.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda, "ratio": 1.0}
    if config.offload_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": on_cuda}
    return section
