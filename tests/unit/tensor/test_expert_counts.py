"""Numbers of parameters of experts that share a central tensor: formula and published counts."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest
import torch

from mpotrain.nn.moe.config import MPOExpertSite
from mpotrain.nn.moe.experts import MPOExperts
from mpotrain.tensor.experts import asymmetric_spec, auxiliary_shapes, num_expert_parameters
from mpotrain.tensor.spec import MPOSpec, mpo_spec

HIDDEN, FFN = 768, 3072
NARROW, WIDE = (3, 4, 4, 4, 4), (4, 4, 8, 6, 4)
PUBLISHED = {
    "wi": mpo_spec(HIDDEN, FFN, NARROW, WIDE),
    "wo": mpo_spec(FFN, HIDDEN, WIDE, NARROW),
}
SMALL = mpo_spec(24, 40, (2, 3, 4), (5, 4, 2), cap=6)
TWELVE = asymmetric_spec(32, 48, 8, 8)
"""An operator whose central tensor has exactly twelve times the elements of its auxiliaries."""
SPECS = {
    **PUBLISHED,
    "wi, bonds 64": mpo_spec(HIDDEN, FFN, NARROW, WIDE, cap=64),
    "half bonds": asymmetric_spec(HIDDEN, FFN, 64, 64, 32, 32),
    "small": SMALL,
    "twelve": TWELVE,
}


def gamma(spec: MPOSpec) -> Fraction:
    """Elements of the central tensor over those of one expert's auxiliaries, from core shapes."""
    sizes = [prod(shape) for shape in spec.core_shapes]
    central = sizes[spec.central_index]
    return Fraction(central, sum(sizes) - central)


def share_of_full_experts(spec: MPOSpec, num_experts: int) -> Fraction:
    """Parameters of all experts over those of experts that share nothing, in their MPO form."""
    return Fraction(
        num_expert_parameters(spec, num_experts), num_experts * sum(map(prod, spec.core_shapes))
    )


@pytest.mark.parametrize("num_experts", [1, 2, 8, 128])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_share_follows_the_formula(spec: MPOSpec, num_experts: int) -> None:
    """Gao et al. 2022, section 3.1: (E + gamma) / (E (gamma + 1)), T counting the MPO form."""
    ratio = gamma(spec)
    wanted = (num_experts + ratio) / (num_experts * (ratio + 1))
    assert share_of_full_experts(spec, num_experts) == wanted


def test_published_share_of_eight_experts() -> None:
    assert gamma(TWELVE) == 12
    assert share_of_full_experts(TWELVE, 8) == Fraction(20, 104)
    # The published shape has a little more than the twelve that the paper reckons with.
    assert float(gamma(PUBLISHED["wi"])) == pytest.approx(12.772, abs=5e-4)
    assert float(share_of_full_experts(PUBLISHED["wi"], 8)) == pytest.approx(0.1885, abs=5e-5)


@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_built_experts_have_the_counted_parameters(num_experts: int) -> None:
    site = MPOExpertSite(in_modes=SMALL.in_modes, out_modes=SMALL.out_modes, cap=6)
    assert site.spec(24, 40) == SMALL
    built = MPOExperts(
        SMALL,
        site,
        num_experts,
        bias=False,
        std=0.02,
        generator=torch.Generator().manual_seed(0),
    )
    counted = sum(parameter.numel() for parameter in built.parameters())
    assert counted == num_expert_parameters(SMALL, num_experts)


@pytest.mark.parametrize("spec", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_matrix(spec: MPOSpec) -> None:
    """The central tensor replaces the dense matrix one for one; an expert adds its auxiliaries."""
    assert prod(spec.core_shapes[spec.central_index]) == HIDDEN * FFN == 2_359_296
    assert sum(map(prod, auxiliary_shapes(spec))) == 184_720
    assert num_expert_parameters(spec, 5) - num_expert_parameters(spec, 4) == 184_720


def t5_base() -> int:
    """Count the parameters of T5-base (Raffel et al. 2020): no biases, one tied embedding."""
    attention, ffn, norm = 4 * HIDDEN**2, 2 * HIDDEN * FFN, HIDDEN
    encoder = 12 * (attention + ffn + 2 * norm) + norm
    decoder = 12 * (2 * attention + ffn + 3 * norm) + norm
    relative_positions = 2 * 32 * 12
    return 32_128 * HIDDEN + encoder + decoder + relative_positions


@pytest.mark.parametrize(
    ("num_experts", "wanted", "published"),
    [(4, 258_369_792, 258), (8, 293_836_032, 294), (16, 364_768_512, 365)],
)
def test_t5_base_with_mixtures_in_every_block(
    num_experts: int, wanted: int, published: int
) -> None:
    """Tables 1 and 2 of Gao et al. 2022; routers, which they leave out, change no million."""
    assert t5_base() == 222_903_552
    experts = 24 * sum(num_expert_parameters(spec, num_experts) for spec in PUBLISHED.values())
    total = t5_base() - 24 * 2 * HIDDEN * FFN + experts
    routers = 24 * num_experts * (HIDDEN + 1)
    assert total == wanted
    assert round(total / 1e6) == round((total + routers) / 1e6) == published


def test_t5_base_with_dense_experts() -> None:
    """Switch with eight experts: seven more copies of 48 matrices, printed as 1015 million."""
    copies = sum(spec.in_features * spec.out_features for spec in PUBLISHED.values())
    total = t5_base() + 7 * 24 * copies
    assert total == 1_015_627_008
    assert total // 10**6 == 1015
