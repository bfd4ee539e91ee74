"""The configuration of megatron-core's modules, derived from the sections of a run."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.plan import ParallelConfig


def transformer_config(
    model: AnyModel, engine: MegatronConfig, parallel: ParallelConfig, *, on_cuda: bool
) -> TransformerConfig:
    """Return what megatron-core's layers, schedules and wrappers read.

    Biases and activations are not fused: the layers here are not core's. Losses are sums over
    tokens (`calculate_per_token_loss`), so no reduction divides by the number of ranks.

    Args:
        model: the network.
        engine: the engine section.
        parallel: the degrees.
        on_cuda: whether to compute on CUDA.
    """
    dtype = torch.bfloat16 if engine.dtype == "bf16" else torch.float32
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    return TransformerConfig(
        num_layers=_num_layers(model),
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        kv_channels=_head_size(model),
        ffn_hidden_size=model.ffn_size,
        hidden_dropout=model.dropout,
        attention_dropout=_attention_dropout(model),
        layernorm_epsilon=getattr(model, "norm_eps", 1e-5),
        normalization="RMSNorm" if isinstance(model, T5Config) else "LayerNorm",
        add_bias_linear=_has_biases(model, parallel),
        bf16=engine.dtype == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not on_cuda,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        # Nothing is captured; core's own default is one that it warns of.
        cuda_graph_scope=[],
        # Batched exchanges of the interleaved schedule on two stages mix up the two messages
        # between the same pair of ranks, and training goes wrong without a word.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        **_mixture(model, engine),
    )


def _num_layers(model: AnyModel) -> int:
    decoder = model.num_decoder_layers if isinstance(model, T5Config) else None
    return decoder or model.num_layers


def _head_size(model: AnyModel) -> int:
    return model.head_size if isinstance(model, T5Config) else model.hidden_size // model.num_heads


def _attention_dropout(model: AnyModel) -> float:
    return model.dropout if isinstance(model, T5Config) else model.attention_dropout


def _has_biases(model: AnyModel, parallel: ParallelConfig) -> bool:
    # Layers here take their biases from the network, whatever this says; core's own experts have
    # none under expert-tensor parallelism, and core refuses to hear of any there.
    return not isinstance(model, T5Config) and parallel.expert_tensor == 1


def _mixture(model: AnyModel, engine: MegatronConfig) -> dict[str, Any]:
    if isinstance(model, EncoderConfig) or model.moe is None:
        return {}
    return {
        "num_moe_experts": model.moe.num_experts,
        "moe_router_topk": model.moe.router.top_k,
        "moe_ffn_hidden_size": model.ffn_size,
        "moe_token_dispatcher_type": engine.moe_dispatcher,
        # What megatron-core's own router would do; ours reads its section of the run file. With one
        # expert for each token core insists on this.
        "moe_router_pre_softmax": model.moe.router.top_k == 1,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.0,
    }
