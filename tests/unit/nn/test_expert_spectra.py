"""Spectra of experts are those of the matrices that they stand for."""

import math

import pytest
import torch
from torch import Tensor, nn

from mpotrain.inspect import site_rows
from mpotrain.nn.moe.config import MPOExpertSite
from mpotrain.nn.moe.experts import MPOExperts
from mpotrain.nn.spectra import MOST_EXPERTS, model_spectra
from mpotrain.tensor.contract import rebuild

SITE = MPOExpertSite(start="independent", in_modes=(2, 3, 4), out_modes=(3, 4, 2), cap=5)


def experts(count: int, seed: int = 0) -> MPOExperts:
    generator = torch.Generator().manual_seed(seed)
    spec = SITE.spec(24, 24)
    return MPOExperts(spec, SITE, count, bias=True, std=0.3, generator=generator)


def matrix(module: MPOExperts, number: int) -> Tensor:
    cores = [core[number] for core in module.auxiliaries]
    cores.insert(module.spec.central_index, module.central)
    return rebuild([core.detach().double() for core in cores], module.spec)


def first_bond_entropy(weight: Tensor) -> float:
    unfolding = weight.view(2, 12, 3, 8).transpose(1, 2).reshape(6, 96)
    probabilities = torch.linalg.svdvals(unfolding).square()
    probabilities = probabilities / probabilities.sum()
    return float(-torch.special.xlogy(probabilities, probabilities).sum())


def test_norms_and_entropies_are_means_over_the_experts() -> None:
    module = experts(3)
    with torch.no_grad():
        module.auxiliaries[0][1] *= 3.0
    (site,) = model_spectra(nn.ModuleDict({"ffn": module}))
    weights = [matrix(module, e) for e in range(3)]
    assert (site.name, site.num_experts) == ("ffn", 3)
    assert site.weight_norm == pytest.approx(sum(float(w.norm()) for w in weights) / 3)
    assert site.entropies[0] == pytest.approx(sum(map(first_bond_entropy, weights)) / 3)
    assert site.normalised[0] == pytest.approx(site.entropies[0] / math.log(5))
    first = module.auxiliaries[0].detach().square().sum(dim=(1, 2, 3, 4)).mean().sqrt()
    assert site.norms[0] == pytest.approx(float(first), rel=1e-6)
    assert site.norms[1] == pytest.approx(float(module.central.detach().norm()), rel=1e-6)
    assert len(site.norms) == 3


def test_of_many_experts_a_few_are_looked_at() -> None:
    module = experts(2 * MOST_EXPERTS)
    (before,) = model_spectra(module)
    with torch.no_grad():
        module.auxiliaries[0][1::2] *= 100.0  # none of those that are looked at
    (after,) = model_spectra(module)
    assert before.weight_norm == after.weight_norm
    assert after.norms[0] > before.norms[0]


def test_spread_tells_copies_from_independent_experts() -> None:
    module = experts(4)
    assert 0.6 < model_spectra(module)[0].expert_spread < 1
    with torch.no_grad():
        for core in module.auxiliaries:
            core.copy_(core[:1].expand_as(core))
    assert model_spectra(module)[0].expert_spread == pytest.approx(0, abs=1e-7)


def test_rows_count_the_cores_of_all_experts() -> None:
    module = experts(4)
    (row,) = site_rows(model_spectra(module))
    assert row.parameters == sum(p.numel() for p in module.parameters()) - 4 * 24
    assert row.dense_parameters == 4 * 24 * 24
