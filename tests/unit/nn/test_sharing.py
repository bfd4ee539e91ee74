"""Layers around shared tensors: values, gradients, folding, spectra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpotrain.inspect import site_rows
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.deep_init import draw_operator, join_cores, split_cores
from mpotrain.nn.linear import DenseLinear, TensorizedLinear
from mpotrain.nn.roles import Role, role_of
from mpotrain.nn.sharing import Adapter, CentralBank, SharedLinear, folded_weight, project
from mpotrain.nn.spectra import model_spectra
from mpotrain.tensor.contract import rebuild

ROWS, COLUMNS = 12, 24
SITES: list[MPOSite | TTMSite] = [
    MPOSite(in_modes=(3, 4), out_modes=(4, 6)),
    MPOSite(in_modes=(2, 3, 2), out_modes=(2, 3, 4), cap=5),
    MPOSite(in_modes=(2, 1, 3, 2, 1), out_modes=(2, 2, 3, 2, 1)),
    MPOSite(in_modes=(2, 3, 2), out_modes=(2, 3, 4), plan="materialise", keep_weight=True),
    MPOSite(in_modes=(2, 3, 2), out_modes=(2, 3, 4), plan="chain"),
    MPOSite(in_modes=(4, 4), out_modes=(5, 5)),
    TTMSite(rank=4),
]


def draw(site: MPOSite | TTMSite, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return draw_operator(site.spec(ROWS, COLUMNS), site, 0.3, generator)


def layer_of(site: MPOSite | TTMSite, *, bias: bool = True, seed: int = 0) -> SharedLinear:
    spec = site.spec(ROWS, COLUMNS)
    _, auxiliaries = draw(site, seed)
    return SharedLinear(spec, site, auxiliaries, bias=bias, bank="bank.w.0")


def test_layer_in_the_chain() -> None:
    """The sites really take different ways."""
    kinds = {layer_of(site).plan(7, torch.float32, torch.device("cpu")).kind for site in SITES}
    assert {"materialise", "chain"} <= kinds


@pytest.mark.parametrize("site", SITES)
def test_values_and_gradients_are_those_of_the_rebuilt_matrix(site: MPOSite | TTMSite) -> None:
    layer = layer_of(site).double()
    central = draw(site)[0].double().requires_grad_()
    x = torch.randn(5, 7, ROWS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, COLUMNS, dtype=torch.float64)
    assert layer.bias is not None
    inputs = [x, central, *layer.parameters()]
    got = layer(x, central)
    expected = x @ rebuild(layer.cores(central), layer.spec) + layer.bias
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    one = torch.autograd.grad((got * weight).sum(), inputs)
    other = torch.autograd.grad((expected * weight).sum(), inputs)
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("site", SITES[:4])
def test_a_shared_layer_has_the_bits_of_one_that_owns_its_cores(site: Any) -> None:
    """Same plan, same order of sums: sharing is a matter of ownership alone."""
    own = TensorizedLinear(site.spec(ROWS, COLUMNS), site, bias=True, std=0.3)
    central, auxiliaries = split_cores(list(own.cores), own.spec)
    shared = SharedLinear(own.spec, site, auxiliaries, bias=True, bank="bank.w.0")
    x = torch.randn(9, ROWS)
    assert torch.equal(own(x), shared(x, central))
    for core, other in zip(own.cores, join_cores(central, auxiliaries, own.spec), strict=True):
        assert core is other


def test_roles_and_ownership() -> None:
    site = SITES[1]
    layer, bank = layer_of(site), CentralBank({"w": [draw(site)[0]]})
    roles = {name: role_of(p) for name, p in layer.named_parameters()}
    assert roles == {
        "auxiliaries.0": Role.AUXILIARY, "auxiliaries.1": Role.AUXILIARY, "bias": Role.DENSE,
    }  # fmt: skip
    assert {name: role_of(p) for name, p in bank.named_parameters()} == {"w.0": Role.CENTRAL}
    layer(torch.randn(2, ROWS), bank.central("w", 0)).sum().backward()
    assert len(list(layer.parameters())) == 3  # what is passed is not registered again
    assert bank.get_parameter("w.0").grad is not None
    adapter = Adapter(4, 6, 2, std=0.1, generator=torch.Generator().manual_seed(0))
    assert {role_of(p) for p in adapter.parameters()} == {Role.ADAPTER}
    assert [tuple(p.shape) for p in adapter.parameters()] == [(4, 2), (2, 6)]
    assert not adapter.u.any()


def layers_for_projection() -> list[nn.Module]:
    generator = torch.Generator().manual_seed(3)
    spec, site = SITES[1].spec(ROWS, COLUMNS), SITES[1]
    return [
        DenseLinear(ROWS, COLUMNS, bias=False, std=0.3, generator=generator),
        TensorizedLinear(spec, site, bias=False, std=0.3, generator=generator),
        layer_of(site, bias=False),
    ]


@pytest.mark.parametrize("number", range(3))
def test_what_is_given_is_added_and_folds_into_a_dense_matrix(number: int) -> None:
    layer = layers_for_projection()[number].double()
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parts = {
        "central": draw(SITES[1])[0].double(),
        "bias": normal(COLUMNS),
        "u": normal(ROWS, 2),
        "d": normal(2, COLUMNS),
    }
    x = normal(5, ROWS)
    assert isinstance(layer, DenseLinear | TensorizedLinear | SharedLinear)
    folded = folded_weight(layer, parts)
    assert folded.shape == (ROWS, COLUMNS)
    got = project(layer, x, parts)
    torch.testing.assert_close(got, x @ folded + parts["bias"], rtol=1e-10, atol=1e-10)
    bare = folded_weight(layer, {"central": parts["central"]})
    torch.testing.assert_close(folded - bare, parts["u"] @ parts["d"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        project(layer, x, {"central": parts["central"]}), x @ bare, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("number", range(3))
def test_compute_dtype_is_that_of_x_and_gradients_that_of_the_parameters(number: int) -> None:
    layer = layers_for_projection()[number]
    adapter = Adapter(ROWS, COLUMNS, 2, std=0.1, generator=torch.Generator().manual_seed(0))
    central, bias = draw(SITES[1])[0].requires_grad_(), torch.zeros(COLUMNS, requires_grad=True)
    parts = {"central": central, "bias": bias, "u": adapter.u, "d": adapter.d}
    y = project(layer, torch.randn(5, ROWS, dtype=torch.bfloat16), parts)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    given = [bias, adapter.u, adapter.d, *([central] if number == 2 else [])]
    for tensor in [*given, *layer.parameters()]:
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32


class Network(nn.Module):
    """Two layers around one central tensor, as a network owns them."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = CentralBank({"w": [draw(SITES[1])[0]]})
        self.layers = nn.ModuleList(layer_of(SITES[1], seed=seed) for seed in (0, 1))


@pytest.mark.parametrize("wrapped", [False, True])
def test_spectra_show_layers_with_the_central_tensor_that_they_share(wrapped: bool) -> None:
    network = Network()
    model = nn.ModuleDict({"encoder": network}) if wrapped else network
    prefix = "encoder." if wrapped else ""
    found = model_spectra(model)
    assert [site.name for site in found] == [f"{prefix}layers.0", f"{prefix}layers.1"]
    central = network.bank.central("w", 0).detach()
    for site, layer in zip(found, network.layers, strict=True):
        assert isinstance(layer, SharedLinear)
        cores = [core.detach().double() for core in layer.cores(central)]
        norm = float(rebuild(cores, layer.spec).norm())
        assert site.weight_norm == pytest.approx(norm, rel=1e-9)
        assert site.norms == pytest.approx([float(core.norm()) for core in cores])
        assert site.bank == f"{prefix}bank.w.0"
        assert len(site.entropies) == 2
    assert found[0].norms != found[1].norms
    assert len(site_rows(found)) == 2
    # The central tensor counts once.
    biases = 2 * COLUMNS
    assert sum(site.num_parameters for site in found) + biases == sum(
        parameter.numel() for parameter in network.parameters()
    )


def test_a_layer_without_its_network_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"bank\.w\.0, which no network around it owns"):
        model_spectra(layer_of(SITES[1]))
