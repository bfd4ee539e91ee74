"""Tensorized linear layers and embeddings as modules: roles, plans, spectra."""

import pytest
import torch
from torch import nn

from mpotrain.nn.config import DenseSite, MPOSite, TTMSite, site_problems
from mpotrain.nn.linear import DenseLinear, TensorizedEmbedding, TensorizedLinear, profile_name
from mpotrain.nn.roles import Role, role_of, set_role
from mpotrain.nn.spectra import model_spectra, tensorized_layers
from mpotrain.tensor.contract import rebuild

SITE = MPOSite(in_modes=(3, 4, 2), out_modes=(4, 3, 2), cap=5)


def layer(
    site: MPOSite | TTMSite = SITE, in_features: int = 23, out_features: int = 24
) -> TensorizedLinear:
    generator = torch.Generator().manual_seed(0)
    return TensorizedLinear(
        site.spec(in_features, out_features), site, bias=True, std=0.3, generator=generator
    )


@pytest.mark.parametrize("plan", ["auto", "materialise", "chain", "groups"])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3, 5), (0,)])
def test_forward_and_gradients_equal_the_rebuilt_matrix(plan: str, rows: tuple[int, ...]) -> None:
    from dataclasses import replace

    module = layer(replace(SITE, plan=plan)).double()
    torch.nn.init.normal_(module.bias)
    x = torch.randn(*rows, 23, dtype=torch.float64, requires_grad=True)
    weight = rebuild(list(module.cores), module.spec)
    reference = x @ weight + module.bias
    y = module(x)
    torch.testing.assert_close(y, reference)
    upstream = torch.randn_like(y)
    wanted = [x, *module.parameters()]
    ours = torch.autograd.grad(y, wanted, upstream)
    theirs = torch.autograd.grad(reference, wanted, upstream)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)


def test_roles_are_marked() -> None:
    module = layer()
    assert [role_of(core) for core in module.cores] == [
        Role.AUXILIARY, Role.CENTRAL, Role.AUXILIARY,
    ]  # fmt: skip
    assert role_of(module.bias) is Role.DENSE
    assert role_of(set_role(nn.Parameter(torch.ones(1)), Role.ADAPTER)) is Role.ADAPTER


def test_cores_are_contiguous() -> None:
    # Engines view parameters as flat memory.
    for site in (SITE, TTMSite(rank=4)):
        assert all(core.is_contiguous() for core in layer(site).cores)


def test_dense_layer_keeps_its_own_dtype_and_computes_in_that_of_x() -> None:
    dense = DenseLinear(8, 4, bias=True, std=0.1)
    y = dense(torch.randn(3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert dense.weight.grad is not None
    assert dense.weight.grad.dtype == torch.float32
    assert DenseLinear(8, 4, bias=False, std=0.1).bias is None


def test_embedding_looks_up_and_scores_with_the_same_table() -> None:
    site = MPOSite(in_modes=(5, 4), out_modes=(3, 4), cap=6)
    module = TensorizedEmbedding(site.spec(19, 12), site, std=0.5).double()
    table = rebuild(list(module.cores), module.spec)
    tokens = torch.randint(19, (3, 4))
    torch.testing.assert_close(module(tokens, torch.float64), table[tokens])
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(module.logits(x), x @ table.T)


def test_spectra_of_a_model_are_those_of_its_matrices() -> None:
    model = nn.ModuleDict({"a": layer(), "b": nn.Linear(3, 3), "c": layer(TTMSite(rank=4), 24)})
    assert [name for name, _ in tensorized_layers(model)] == ["a", "c"]
    site = model_spectra(model)[0]
    weight = rebuild(list(model["a"].double().cores), site.spec)
    # Padding is part of the operator, so the matrix that is used can only be smaller.
    assert site.weight_norm >= float(torch.linalg.matrix_norm(weight.detach())) - 1e-9
    assert len(site.norms) == 3
    assert len(site.entropies) == len(site.normalised) == 2
    assert all(0 < value <= 1 for value in site.normalised)


def test_problems_of_a_site_begin_with_its_key() -> None:
    assert site_problems(DenseSite(), (8, 8), "model.sites.qkv") == []
    found = site_problems(SITE, (25, 24), "model.sites.qkv")
    assert len(found) == 1
    assert found[0].startswith("model.sites.qkv: ")
    assert "24" in found[0]
    assert "25" in found[0]


def test_padding_that_can_only_be_a_mistake_is_refused() -> None:
    site = MPOSite(in_modes=(8, 80), out_modes=(16, 16), cap=4)
    (line,) = site_problems(site, (64, 256), "model.sites.c_fc")
    assert line.startswith("model.sites.c_fc.in_modes: the modes multiply to 640")
    assert site_problems(MPOSite(in_modes=(8, 9), out_modes=(16, 16)), (64, 256), "x") == []


def test_plans_on_a_cpu_use_the_cpu_profile() -> None:
    assert profile_name(torch.device("cpu"), torch.bfloat16) == "cpu"
