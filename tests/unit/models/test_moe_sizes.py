"""Sizes of GPT-2 with mixtures of experts, foretold without torch and held to the built model."""

from dataclasses import replace
from pathlib import Path

import pytest

from mpotrain.config import load_config
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.nn.config import DenseSite, TTMSite
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.sample import causal_lengths

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "runs"
TINY = GPT2Config(
    vocab_size=100, context_length=16, hidden_size=24, num_layers=4, num_heads=2, ffn_size=96
)
MPO_FC = MPOExpertSite(start="independent", in_modes=(2, 6, 2), out_modes=(4, 6, 4))
MPO_PROJ = MPOExpertSite(
    start="independent", in_modes=(4, 6, 4), out_modes=(2, 6, 2), cap=5, bias=False
)
MIXTURES = [
    MoEConfig(num_experts=3),
    MoEConfig(
        num_experts=4, every=2, c_fc=MPO_FC, c_proj=MPO_PROJ,
        router=RouterConfig(top_k=2, bias=True, balance_rate=0.001),
    ),
    MoEConfig(
        num_experts=4,
        every=3,
        c_fc=AsymmetricExpertSite(start="independent", in_mode=6, out_mode=8, in_bond=3),
        c_proj=DenseExpertSite(bias=False),
    ),
]  # fmt: skip


@pytest.mark.parametrize("moe", MIXTURES)
def test_foretold_parameters_and_buffers_equal_those_of_the_model(moe: MoEConfig) -> None:
    from mpotrain.models.gpt2 import GPT2
    from mpotrain.nn.roles import experts_of, role_of

    sites = GPT2Sites() if moe.every == 1 else GPT2Sites(c_fc=TTMSite(rank=8))
    config = replace(TINY, sites=sites, moe=moe)
    assert config.problems("model") == []
    model = GPT2(config, seed=0)
    built = {
        name: (tuple(p.shape), str(role_of(p)), experts_of(p))
        for name, p in model.named_parameters()
    }
    foretold = {p.name: (p.shape, p.role, p.num_experts) for p in config.parameters()}
    assert built == foretold
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    assert buffers == {buffer.name: buffer.shape for buffer in config.buffers()}
    assert all(buffer.role == "buffer" for buffer in config.buffers())
    assert bool(buffers) == (moe.router.balance_rate > 0)


def test_published_experts_share_central_tensors_as_large_as_their_matrices() -> None:
    model = load_config(CONFIGS / "gpt2-small-mpoe8.toml").model
    sizes = {p.name: p.size for p in model.parameters()}
    for matrix in ("c_fc", "c_proj"):
        site = f"blocks.5.ffn.{matrix}"
        whole = sum(size for name, size in sizes.items() if name.startswith(f"{site}."))
        biases = sizes[f"{site}.bias"]
        assert sizes[f"{site}.central"] == 768 * 3072 == 2_359_296
        assert whole - biases == 3_837_056 == 2_359_296 + 8 * 184_720
        assert biases == 8 * (3072 if matrix == "c_fc" else 768)


@pytest.mark.parametrize("experts", [8, 16])
def test_counts_of_mpoe_on_gpt2_small(experts: int) -> None:
    model = load_config(CONFIGS / f"gpt2-small-mpoe{experts}.toml").model
    dense = load_config(CONFIGS / "gpt2-small-dense.toml").model.num_parameters()
    auxiliaries, router = 2 * 184_720, 768
    biases = 3072 + 768
    added = 12 * (experts * (auxiliaries + router) + (experts - 1) * biases)
    assert model.num_parameters() == dense + added
    # A token meets one expert and all of the router.
    assert model.active_parameters() == dense + 12 * (auxiliaries + experts * router)


def test_counts_of_dense_experts_on_gpt2_small() -> None:
    model = load_config(CONFIGS / "gpt2-small-switch8.toml").model
    dense = load_config(CONFIGS / "gpt2-small-dense.toml").model
    added = 12 * (7 * (2 * 768 * 3072 + 3072 + 768) + 8 * 768)
    assert model.num_parameters() == dense.num_parameters() + added
    assert model.active_parameters() == dense.num_parameters() + 12 * 8 * 768
    # What top-1 executes beyond the dense model is its router.
    assert (
        model.flops_per_token(causal_lengths(512)) - dense.flops_per_token(causal_lengths(512))
        == 6 * 12 * 8 * 768
    )


def test_half_bonds_leave_a_quarter_of_the_shared_matrix() -> None:
    model = load_config(CONFIGS / "gpt2-small-mpoe8-asymmetric.toml").model
    sizes = {p.name: p.size for p in model.parameters()}
    assert sizes["blocks.0.ffn.c_fc.central"] == 768 * 3072 // 4
    assert sizes["blocks.0.ffn.c_proj.auxiliaries.1"] == 8 * 32 * 64


def test_active_parameters_follow_top_k() -> None:
    moe = MIXTURES[1]
    config = replace(TINY, moe=moe)
    own = sum(p.size for p in config.parameters() if p.num_experts)
    assert config.num_parameters() - config.active_parameters() == own // 2
    one = replace(config, moe=replace(moe, router=replace(moe.router, top_k=1)))
    assert config.active_parameters() - one.active_parameters() == own // 4
    flops = config.flops_per_token(causal_lengths(16)) - one.flops_per_token(causal_lengths(16))
    assert flops == 6 * 2 * (24 * 96 + 96 * 24)
    assert TINY.active_parameters() == TINY.num_parameters()


def test_blocks_have_a_mixture_or_a_feed_forward_layer() -> None:
    config = replace(TINY, moe=MIXTURES[1])
    families = [site.family for site in config.all_sites()]
    assert config.mixtures() == ["blocks.1.ffn", "blocks.3.ffn"]
    assert families.count("c_fc") == families.count("expert_c_fc") == 2
    assert families.count("router") == families.count("expert_c_proj") == 2
    names = {site.name: site for site in config.all_sites()}
    assert names["blocks.0.ffn.c_fc"].num_experts == 0
    assert names["blocks.1.ffn.c_fc"].num_experts == 4
    assert {site.key for site in names.values()} == {
        "sites.embedding", "sites.qkv", "sites.attention_out", "sites.c_fc", "sites.c_proj",
        "moe.router", "moe.c_fc", "moe.c_proj",
    }  # fmt: skip


def test_projections_of_experts_start_with_the_residual_scale() -> None:
    config = replace(TINY, moe=MIXTURES[1], init_std=0.02)
    scaled = 0.02 / 8**0.5
    assert config.site_std("expert_c_proj") == pytest.approx(scaled)
    assert config.site_std("expert_c_fc") == config.site_std("router") == 0.02
    assert replace(config, residual_init_scaling=False).site_std("expert_c_proj") == 0.02


def test_problems_of_mixtures_name_their_keys() -> None:
    moe = MoEConfig(
        num_experts=4, every=5, router=RouterConfig(top_k=5),
        c_fc=AsymmetricExpertSite(start="independent", in_mode=7, out_mode=8),
    )  # fmt: skip
    found = replace(TINY, moe=moe).problems("model")
    keys = {line.partition(":")[0] for line in found}
    assert keys == {"model.moe.every", "model.moe.router.top_k", "model.moe.c_fc"}
    unused = replace(
        TINY, moe=MoEConfig(num_experts=4), sites=GPT2Sites(c_proj=DenseSite(bias=False))
    )
    assert len(unused.problems("model")) == 1
    assert unused.problems("model")[0].startswith("model.sites.c_proj: has no effect")
    assert replace(unused, moe=replace(MIXTURES[1])).problems("model") == []
