"""Where matrices of whole networks meet, and what is said where they cannot be cut."""

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from mpotrain.config import load_config
from mpotrain.engine.megatron.feature_cuts import (
    FeaturePeriods,
    feature_periods,
    feature_problems,
    rank_part,
)
from mpotrain.engine.megatron.periods import ModeCut
from mpotrain.errors import ParallelError
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.models.t5_config import T5Config
from mpotrain.nn.config import DenseSite, MPOSite, TTMSite
from mpotrain.nn.moe.config import AsymmetricExpertSite, MoEConfig, MPOExpertSite

RUNS = sorted((Path(__file__).resolve().parents[4] / "configs" / "runs").glob("*.toml"))


def gpt(heads: int = 4, moe: MoEConfig | None = None, **sites: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=64, context_length=16, hidden_size=32, num_layers=2, num_heads=heads,
        ffn_size=96, sites=GPT2Sites(**sites), moe=moe,
    )  # fmt: skip


def mpo(ins: tuple[int, ...], outs: tuple[int, ...]) -> MPOSite:
    return MPOSite(in_modes=ins, out_modes=outs)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_network_can_be_cut(path: Path, tensor: int) -> None:
    model = load_config(path).model
    for expert_tensor in (1, tensor):
        assert feature_problems(model, tensor, expert_tensor) == []
        periods = feature_periods(model, tensor, expert_tensor)
        for site in model.all_sites():
            part = rank_part(site, periods, tensor, expert_tensor)
            if site.spec is not None and part.parts > 1:
                own = part.spec(site.spec)
                cut = own.out_features if part.side == "out" else own.in_features
                whole = site.out_features if part.side == "out" else site.in_features
                assert cut * part.parts == whole
                assert not own.is_padded
                assert own.bonds == site.spec.bonds


def test_heads_stay_whole_and_the_three_parts_of_fused_queries_are_cut_alike() -> None:
    # 4 heads of 8; queries, keys and values are 32 features each.
    model = gpt(qkv=mpo((4, 4, 2), (6, 4, 4)), attention_out=mpo((2, 4, 4), (4, 4, 2)))
    periods = feature_periods(model, 2, 1)
    # Of the modes below the heads only whole ones above 8 features may be parted.
    assert periods == FeaturePeriods(attention=16, ffn=96, expert=96)
    site = next(site for site in model.all_sites() if site.family == "qkv")
    assert rank_part(site, periods, 2).cut == ModeCut(core=1, period=4)
    out = next(site for site in model.all_sites() if site.family == "attention_out")
    assert rank_part(out, periods, 2).cut == ModeCut(core=1, period=4)
    assert feature_periods(gpt(), 4, 1).attention == 32


def test_nothing_is_cut_on_one_rank() -> None:
    model = gpt(c_fc=mpo((4, 4, 2), (3, 7, 5)))
    assert feature_problems(model, 1, 1) == []
    assert feature_periods(model, 1, 1) == FeaturePeriods(attention=32, ffn=96, expert=96)


def degrees(line: str) -> list[int]:
    """Return the degrees that a line says would do."""
    said = line.rpartition("parallel.tensor=")[2]
    return [int(number) for number in re.findall(r"\d+", said)]


@pytest.mark.parametrize("heads", [4, 8])
def test_heads_that_the_ranks_do_not_divide(heads: int) -> None:
    (line,) = feature_problems(gpt(heads), 3, 1)
    assert line.startswith(f"parallel.tensor: 3 ranks do not divide the {heads} heads")
    assert degrees(line) == [2, 4]
    for degree in degrees(line):
        assert feature_problems(gpt(heads), degree, 1) == []


def test_a_mode_that_does_not_divide_is_named_with_one_that_would() -> None:
    model = gpt(c_fc=mpo((4, 4, 2), (3, 32, 1)), c_proj=DenseSite())
    assert feature_problems(model, 4, 1) == []
    odd = gpt(c_fc=mpo((4, 4, 2), (2, 2, 24)))
    assert feature_problems(odd, 4, 1) == []  # 24 = 4 x 6
    odd = gpt(c_fc=mpo((4, 4, 2), (6, 2, 8)), c_proj=mpo((6, 2, 8), (4, 4, 2)))
    assert feature_problems(odd, 4, 1) == []
    odd = replace(gpt(c_fc=mpo((4, 4, 2), (6, 6, 2))), ffn_size=72)
    (line,) = feature_problems(odd, 4, 1)
    assert line.startswith("model.sites.c_fc: no core has an out mode among [6, 6, 2]")
    assert "falls into 4 equal parts (parallel.tensor=4)" in line
    assert degrees(line) == [2]  # beyond 4 there are no more heads
    assert feature_problems(odd, 2, 1) == []
    modes = tuple(int(n) for n in re.findall(r"\d+", line.split("out modes [")[1].split("]")[0]))
    assert prod(modes) == 72
    mended = replace(odd, sites=GPT2Sites(c_fc=mpo((4, 4, 2), modes)))
    assert feature_problems(mended, 4, 1) == []


def test_padding_cannot_be_cut() -> None:
    model = gpt(c_fc=mpo((4, 4, 2), (5, 5, 4)))
    (line,) = feature_problems(model, 2, 1)
    assert line.startswith("model.sites.c_fc: its out modes [5, 5, 4] multiply to 100")
    assert degrees(line) == [1]
    # Padding on the side that no rank shares does no harm.
    assert feature_problems(gpt(c_fc=mpo((4, 4, 3), (4, 6, 4))), 2, 1) == []


def test_no_common_period_of_two_matrices() -> None:
    model = replace(
        gpt(c_fc=mpo((4, 4, 2), (2, 7, 7)), c_proj=mpo((7, 7, 2), (4, 4, 2))), ffn_size=98
    )
    (line,) = feature_problems(model, 2, 1)
    assert line.startswith("model.sites.c_fc: no period of features is common")
    assert "out modes [2, 7, 7] of model.sites.c_fc offer 98" in line
    assert "in modes [7, 7, 2] of model.sites.c_proj offer 2" in line
    assert degrees(line) == [1]
    alike = replace(model.sites, c_proj=mpo((2, 7, 7), (4, 4, 2)))
    assert feature_problems(replace(model, sites=alike), 2, 1) == []


def test_all_problems_at_once_and_refusal() -> None:
    model = gpt(c_fc=mpo((4, 4, 2), (5, 5, 4)), qkv=TTMSite(rank=8))
    lines = feature_problems(model, 3, 1)
    assert len(lines) == 2
    assert lines[0].startswith("parallel.tensor: 3 ranks do not divide the 4 heads")
    assert lines[1].startswith("model.sites.c_fc: its out modes")
    with pytest.raises(ParallelError, match="its out modes"):
        feature_periods(model, 3, 1)


def experts(**sites: Any) -> MoEConfig:
    return MoEConfig(num_experts=4, **sites)


def test_experts_are_cut_over_their_own_ranks() -> None:
    site = MPOExpertSite(in_modes=(4, 4, 2), out_modes=(3, 3, 9))
    back = MPOExpertSite(in_modes=(3, 3, 9), out_modes=(4, 4, 2))
    model = replace(gpt(moe=experts(c_fc=site, c_proj=back)), ffn_size=81)
    assert feature_problems(model, 2, 1) == []
    assert feature_periods(model, 2, 1).expert == 81
    lines = feature_problems(model, 2, 2)
    assert lines == [
        "parallel.expert_tensor: 2 ranks do not divide the 81 inner features; "
        "use parallel.expert_tensor=1"
    ]
    odd = replace(gpt(moe=experts(c_fc=replace(site, out_modes=(3, 16, 2)))), ffn_size=96)
    assert feature_problems(odd, 4, 4) == []
    odd = replace(
        gpt(moe=experts(c_fc=replace(site, out_modes=(6, 6, 2)))), ffn_size=72, num_heads=4
    )
    (line,) = feature_problems(odd, 4, 4)
    assert line.startswith("model.moe.c_fc: no core has an out mode among [6, 6, 2]")
    assert line.endswith("use parallel.expert_tensor=1")
    assert feature_problems(odd, 4, 1) == []


def test_asymmetric_experts_are_cut_on_both_sides_of_the_activation() -> None:
    site = AsymmetricExpertSite(in_mode=4, out_mode=8)
    model = gpt(moe=experts(c_fc=site, c_proj=AsymmetricExpertSite(in_mode=4, out_mode=8)))
    periods = feature_periods(model, 2, 2)
    parts = {
        site.family: rank_part(site, periods, 2, 2)
        for site in model.all_sites()
        if site.num_experts
    }
    for family, part in parts.items():
        site_of = next(site for site in model.all_sites() if site.family == family)
        assert part.cut is not None
        assert site_of.spec is not None
        assert part.spec(site_of.spec).num_parameters < site_of.spec.num_parameters


def test_t5_cuts_heads_that_do_not_make_up_the_hidden_size() -> None:
    model = T5Config(
        vocab_size=64, hidden_size=32, head_size=16, num_layers=1, num_heads=6, ffn_size=64
    )
    lines = feature_problems(model, 3, 1)
    # 3 divides the heads and not the 64 inner features.
    assert lines == [
        "parallel.tensor: 3 ranks do not divide the 64 inner features; use parallel.tensor=2"
    ]
    assert feature_problems(model, 2, 1) == []
    assert feature_periods(model, 2, 1).attention == 96
