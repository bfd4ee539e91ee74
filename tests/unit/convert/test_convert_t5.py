"""T5 made of T5: tensorized, with experts, and dense again; also GPT-2 made dense again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoder_cases import made, trained

from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.models.t5_config import T5Config, T5Sites
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)

DENSE = T5Config(
    vocab_size=60,
    hidden_size=24,
    head_size=6,
    num_layers=2,
    num_decoder_layers=4,
    num_heads=3,
    ffn_size=48,
    relative_buckets=8,
    relative_distance=12,
)
WIDE = MPOSite(in_modes=(2, 3, 4), out_modes=(4, 3, 4))
NARROW = MPOSite(in_modes=(4, 3, 4), out_modes=(2, 3, 4))
HEADS = MPOSite(in_modes=(2, 3, 4), out_modes=(3, 3, 2))
FFN = replace(DENSE, sites=T5Sites(c_fc=WIDE, c_proj=NARROW))
ATTENTION = T5Sites(query=HEADS, key=HEADS, value=TTMSite(rank=6), c_proj=NARROW)
SWITCH = RouterConfig(top_k=1, gate="straight_through")


def mixture(every: int = 1, **experts: object) -> T5Config:
    """Return a T5 with mixtures of experts."""
    chosen = {"router": SWITCH, "num_experts": 3} | experts
    return replace(DENSE, moe=MoEConfig(every=every, **chosen))  # type: ignore[arg-type]


MPO_EXPERTS = {
    "c_fc": MPOExpertSite(in_modes=(2, 3, 4), out_modes=(4, 3, 4)),
    "c_proj": AsymmetricExpertSite(in_mode=6, out_mode=4),
}
IDENTITIES = {
    "copy": (DENSE, DENSE),
    "feed-forward layers tensorized": (DENSE, FFN),
    "attention tensorized, TTM too": (DENSE, replace(DENSE, sites=ATTENTION)),
    "tensorized to dense": (replace(DENSE, sites=ATTENTION), DENSE),
    "experts that share a tensor": (DENSE, mixture(**MPO_EXPERTS)),
    "every other block, dense experts": (DENSE, mixture(2, c_fc=DenseExpertSite())),
    "top-2": (DENSE, mixture(router=RouterConfig(top_k=2), **MPO_EXPERTS)),
    "experts of tensorized layers": (FFN, mixture(**MPO_EXPERTS)),
}


@pytest.mark.parametrize(("old", "new"), IDENTITIES.values(), ids=list(IDENTITIES))
def test_the_new_t5_computes_what_the_old_one_did(old: T5Config, new: T5Config) -> None:
    assert new.problems("model") == []
    filled, _, difference = made(new, trained(old))
    assert filled.is_exact
    # Bonds of a TTM site may be below the exact ones: that one loses something, and says so.
    assert all(error.error < 1e-5 for error in filled.errors if not error.truncated)
    assert (difference < 1e-5) != any(error.truncated for error in filled.errors)


def test_experts_of_both_stacks_are_copies() -> None:
    filled, _, _ = made(mixture(**MPO_EXPERTS), trained(DENSE))
    assert len(filled.errors) == 12
    assert filled.notes == ["not in the source, drawn anew: routers"]
    for stack in ("encoder.blocks.1", "decoder.blocks.3"):
        experts = filled.weights[f"{stack}.ffn.c_fc.auxiliaries.0"]
        assert experts.shape[0] == 3
        assert torch.equal(experts, experts[:1].expand_as(experts))
    assert "decoder.blocks.0.ffn.router.weight" in filled.weights


def test_a_tensorized_gpt2_becomes_dense_again() -> None:
    dense = GPT2Config(
        vocab_size=60, context_length=16, hidden_size=24, num_layers=2, num_heads=3, ffn_size=48
    )
    sites = GPT2Sites(
        embedding=MPOSite(in_modes=(5, 3, 4), out_modes=(4, 3, 2)),
        c_fc=TTMSite(rank=8, bias=False),
        c_proj=NARROW,
    )
    filled, _, difference = made(dense, trained(replace(dense, sites=sites)))
    assert difference < 1e-5
    assert filled.errors == []
    # A bias that the source has not computes nothing.
    assert not filled.weights["blocks.1.ffn.c_fc.bias"].any()


def test_redundant_bonds_of_ttm_are_filled_with_zeros() -> None:
    dense = GPT2Config(
        vocab_size=60, context_length=16, hidden_size=24, num_layers=1, num_heads=3, ffn_size=48
    )
    site = TTMSite(rank=300)
    spec = site.spec(24, 48)
    sites = GPT2Sites(c_fc=site)
    filled, _, difference = made(replace(dense, sites=sites), trained(dense))
    assert difference < 1e-5
    assert filled.weights["blocks.0.ffn.c_fc.cores.0"].shape == spec.core_shapes[0]
