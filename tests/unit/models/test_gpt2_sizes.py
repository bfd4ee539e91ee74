"""Parameter counts without torch: published numbers, and equality with the built model."""

from dataclasses import replace
from pathlib import Path

import pytest

from mpotrain.config import load_config
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.nn.config import DenseSite, MPOSite, TTMSite
from mpotrain.sample import causal_lengths

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "runs"

PUBLISHED = {
    "gpt2-small-dense": 124_439_808,
    "gpt2-small-ttm16": 68_085_504,
    "gpt2-small-ttm32": 71_756_544,
    "gpt2-small-ttm80": 107_698_944,
    "gpt2-medium-ttm72": 218_303_488,
}
"""Chekalina et al. 2023; ranks 16 and 32 were counted without feed-forward biases."""


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_parameter_counts(name: str, count: int) -> None:
    assert load_config(CONFIGS / f"{name}.toml").model.num_parameters() == count


@pytest.mark.parametrize(
    ("hidden", "layers", "count"),
    [
        (768, 12, 124_439_808),
        (1024, 24, 354_823_168),
        (1280, 36, 774_030_080),
        (1600, 48, 1_557_611_200),
    ],
)
def test_published_sizes_of_gpt2(hidden: int, layers: int, count: int) -> None:
    name = {768: "small", 1024: "medium", 1280: "large", 1600: "xl"}[hidden]
    path = CONFIGS.parent / "base" / f"gpt2-{name}.toml"
    run = load_config(CONFIGS / "gpt2-small-dense.toml")
    del run
    import tomllib

    model = GPT2Config(**tomllib.loads(path.read_text())["model"])
    assert (model.hidden_size, model.num_layers) == (hidden, layers)
    assert model.num_parameters() == count


TINY = GPT2Config(
    vocab_size=100, context_length=16, hidden_size=24, num_layers=2, num_heads=2, ffn_size=96
)
MPO = MPOSite(in_modes=(4, 6), out_modes=(8, 12), cap=5)
MIXTURES = [
    GPT2Sites(),
    GPT2Sites(c_fc=TTMSite(rank=8, bias=False), c_proj=TTMSite(rank=8)),
    GPT2Sites(
        embedding=MPOSite(in_modes=(5, 7, 3), out_modes=(2, 4, 3), cap=6),
        qkv=MPOSite(in_modes=(4, 3, 2), out_modes=(6, 4, 3), cap=4),
        attention_out=MPOSite(in_modes=(4, 6), out_modes=(4, 6), layout="tt", cap=8),
        c_fc=MPO,
        c_proj=DenseSite(bias=False),
    ),
]


@pytest.mark.parametrize("sites", MIXTURES)
def test_foretold_parameters_equal_those_of_the_model(sites: GPT2Sites) -> None:
    from mpotrain.models.gpt2 import GPT2
    from mpotrain.nn.roles import role_of

    config = replace(TINY, sites=sites)
    assert config.problems("model") == []
    model = GPT2(config, seed=0)
    built = {n: (tuple(p.shape), str(role_of(p))) for n, p in model.named_parameters()}
    foretold = {p.name: (p.shape, p.role) for p in config.parameters()}
    assert built == foretold
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_problems_name_every_impossible_value() -> None:
    bad = replace(TINY, num_heads=5, sites=GPT2Sites(c_fc=replace(MPO, cap=None, bonds=(33,))))
    found = bad.problems("model")
    assert len(found) == 2
    assert found[0].startswith("model.num_heads: 5 heads do not divide")
    assert found[1].startswith("model.sites.c_fc: ")
    assert "33" in found[1]
    assert "32" in found[1]
    assert len(replace(TINY, hidden_size=0, dropout=1.0).problems("m")) == 2


def test_flops_per_token_count_every_matrix() -> None:
    matrices = 100 * 24 + 2 * (24 * 72 + 24 * 24 + 2 * 24 * 96)
    assert TINY.flops_per_token(causal_lengths(16)) == 6 * matrices + 6 * 2 * 24 * 16
