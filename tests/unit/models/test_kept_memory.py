"""Activation memory of encoders and T5: foretold bytes against what autograd keeps, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from unit.models.encoder_cases import bare

from mpotrain.models.activations import activation_memory
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config
from mpotrain.nn.config import TTMSite
from mpotrain.nn.moe.config import MoEConfig, RouterConfig
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig
from mpotrain.sample import SampleLengths

DROPOUT = 0.1
ENCODER = EncoderConfig(
    vocab_size=64, context_length=24, hidden_size=128, num_layers=2, num_heads=4, ffn_size=512,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
T5_SMALL = T5Config(
    vocab_size=64, hidden_size=128, head_size=40, num_layers=2, num_heads=4, ffn_size=512,
    dropout=0.0,
)  # fmt: skip
SOURCE, TARGET = 24, 15
LENGTHS = SampleLengths(SOURCE, TARGET, 4)


@pytest.fixture
def fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU keep what CUDA's kernels keep; what they compute does not matter here.

    Attention is fused on the CPU only without dropout and without a mask that has a gradient (else
    it keeps tensors of B heads T S elements), RMS normalisation is not, layer normalisation is.
    """
    attention = functional.scaled_dot_product_attention

    def attend(*inputs: Tensor, attn_mask: Tensor | None, **settings: Any) -> Tensor:
        mask = None if attn_mask is None else attn_mask.detach()
        return attention(*inputs, attn_mask=mask, **settings | {"dropout_p": 0.0})

    def rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
        return functional.layer_norm(x, shape, weight, None, eps)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(functional, "rms_norm", rms_norm)


def kept_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps beside parameters; masks of dropout count a byte per element."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    sizes = [t.numel() if is_mask(t) else t.untyped_storage().nbytes() for t in kept.values()]
    del result
    return sum(sizes)


def is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is what the CPU multiplies by to drop: zeros and 1 / (1 - rate)."""
    if tensor.ndim < 3 or not tensor.is_floating_point():
        return False
    kept = torch.tensor(1.0 - DROPOUT, dtype=tensor.dtype).reciprocal()
    return bool((tensor == 0).logical_or((tensor - kept).abs() < 0.01).all())


def encoder_kept(config: EncoderConfig, dtype: torch.dtype, rows: int) -> int:
    model = Encoder(config, seed=0, compute_dtype=dtype)
    data = bare(torch.zeros(rows, SOURCE, dtype=torch.int64))
    return kept_bytes(model, lambda: model.hidden(data))


def t5_kept(config: T5Config, dtype: torch.dtype, rows: int) -> int:
    model = T5(config, seed=0, compute_dtype=dtype)
    source, target = (torch.randint(64, (rows, length)) for length in (SOURCE, TARGET))
    return kept_bytes(model, lambda: model.decode(target, model.encode(source)))


def of_blocks(config: AnyModel, kept: Callable[[Any, int], int], *, added: int = 2) -> int:
    """What more layers keep for more rows: casts of weights and all outside of blocks fall out."""
    deeper = replace(config, num_layers=config.num_layers + added)
    few, many = (kept(deeper, rows) - kept(config, rows) for rows in (2, 6))
    return many - few


def width_of(dtype: torch.dtype) -> int:
    return 4 if dtype == torch.float32 else 2


BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.usefixtures("fused_kernels")
@BOTH_DTYPES
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": DROPOUT},
        {"activation": "relu"},
        {"activation": "relu", "dropout": DROPOUT, "norm": "pre"},
        {"activation": "gelu", "adapter": AdapterConfig(rank=64, families=("query", "c_proj"))},
        {
            "sites": EncoderSites(c_fc=TTMSite(rank=8), query=TTMSite(rank=8)),
            "sharing": SharingConfig(scope="central"),
            "attention_dropout": DROPOUT,
        },
        {"sharing": SharingConfig(scope="all"), "adapter": AdapterConfig(rank=64)},
    ],
)
def test_foretold_memory_of_an_encoder_is_what_autograd_keeps(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    config = replace(ENCODER, **changes)

    def foretold(c: EncoderConfig, rows: int) -> int:
        return activation_memory(c, LENGTHS, rows, width_of(dtype)).blocks

    wanted = of_blocks(config, lambda c, rows: encoder_kept(c, dtype, rows))
    # Beside it each head keeps one number per row of attention.
    assert of_blocks(config, foretold) == pytest.approx(wanted, rel=0.01)


@pytest.mark.usefixtures("fused_kernels")
@BOTH_DTYPES
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": DROPOUT},
        {"moe": MoEConfig(num_experts=4, router=RouterConfig(top_k=2))},
        {"moe": MoEConfig(num_experts=4, every=2), "dropout": DROPOUT},
    ],
)
def test_foretold_memory_of_t5_is_what_autograd_keeps(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    config = replace(T5_SMALL, **changes)

    def foretold(c: T5Config, rows: int) -> int:
        return activation_memory(c, LENGTHS, rows, width_of(dtype)).blocks

    for both in (config, replace(config, num_decoder_layers=2)):  # the encoder alone grows
        wanted = of_blocks(both, lambda c, rows: t5_kept(c, dtype, rows))
        assert of_blocks(both, foretold) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("width", [2, 4])
def test_memory_of_an_encoder_by_hand(width: int) -> None:
    config = replace(ENCODER, embedding_size=32, dropout=0.1, adapter=AdapterConfig(rank=8))
    memory = activation_memory(config, SampleLengths(100, 100, 15), 3, width)
    # 6 H and 2 F; four adapters; fp32 inputs and two statistics of two norms; two masks.
    token = width * (6 * 128 + 2 * 512 + 4 * 8) + 2 * (4 * 128 + 8) + 2 * 128
    assert memory.blocks == 3 * 100 * 2 * token
    # Scores are made of the masked tokens alone, from features of the embedding's width.
    assert memory.output == 3 * 15 * (64 * (width + 8) + 32 * (width + 4))
    assert memory.total == memory.blocks + memory.output
    again = activation_memory(
        replace(config, activation_checkpointing=True), SampleLengths(100, 100, 15), 3, width
    )
    assert again.blocks == 3 * 100 * (2 * width * 128 + token)


def test_memory_of_t5_by_hand() -> None:
    config = replace(T5_SMALL, num_decoder_layers=5, dropout=0.1)
    memory = activation_memory(config, SampleLengths(60, 20, 20), 3, 2)
    hidden, inner, ffn = 128, 160, 512
    # Norm (fp32 input, a statistic, result) and the mask at the end of every part of a block.
    part = (4 + 2 + 1) * hidden + 4
    feed_forward = part + (2 + 2 + 1) * ffn
    encoder = part + 2 * 4 * inner + feed_forward
    # Queries and results of 20 tokens, keys and values of 60.
    cross = part + 2 * 2 * inner + 2 * 2 * inner * 3
    assert memory.blocks == 3 * (2 * 60 * encoder + 5 * 20 * (encoder + cross))
    assert memory.output == 3 * 20 * (64 * 10 + 128 * 6)
