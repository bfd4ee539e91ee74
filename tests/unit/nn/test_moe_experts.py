"""Expert matrices: products, gradients, roles, start values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from moe_cases import SITES, Site, expert_weights, experts
from torch import Tensor

from mpotrain.nn.moe import config as moe_config
from mpotrain.nn.moe.config import AsymmetricExpertSite, DenseExpertSite, MPOExpertSite
from mpotrain.nn.moe.expert_init import init_experts
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.roles import Role, experts_of, role_of
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.spec import MPOSpec, mpo_spec

ALL_SITES = [(f"{kind}-{n}", sites[n]) for kind, sites in SITES.items() for n in (0, 1)]


def layer_of(name: str, site: Site, num_experts: int = 4) -> tuple[DenseExperts | MPOExperts, int]:
    sizes = (12, 24) if name.endswith("0") else (24, 12)
    generator = torch.Generator().manual_seed(3)
    module = experts(site, *sizes, num_experts, generator).double()
    if module.bias is not None:
        torch.nn.init.normal_(module.bias)
    return module, sizes[0]


@pytest.mark.parametrize("plan", ["auto", "grouped", "factored"])
@pytest.mark.parametrize("counts", [[2, 0, 5, 1], [0, 0, 0, 7], [0, 0, 0, 0]])
@pytest.mark.parametrize(("name", "site"), ALL_SITES, ids=[name for name, _ in ALL_SITES])
def test_rows_meet_the_matrix_of_their_expert(
    name: str, site: Site, counts: list[int], plan: str
) -> None:
    if not isinstance(site, DenseExpertSite):
        site = replace(site, plan=plan)
    module, in_features = layer_of(name, site)
    x = torch.randn(sum(counts), in_features, dtype=torch.float64, requires_grad=True)
    weights = expert_weights(module)
    parts = [
        part @ weights[e] + (0 if module.bias is None else module.bias[e])
        for e, part in enumerate(x.split(counts))
    ]
    y, wanted = module(x, counts, 8), torch.cat(parts)
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn_like(y)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad(y, inputs, upstream)
    theirs = torch.autograd.grad(wanted, inputs, upstream)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)


def test_counts_of_another_number_of_experts_are_refused() -> None:
    module, in_features = layer_of("mpo-0", SITES["mpo"][0])
    with pytest.raises(ValueError, match="rows of 2 experts, but this layer holds 4"):
        module(torch.zeros(3, in_features).double(), [1, 2], 3)


@pytest.mark.parametrize("name", ["dense-0", "mpo-0", "asymmetric-0"])
def test_experts_of_a_rank_are_a_cut_of_the_tensors(name: str) -> None:
    module, in_features = layer_of(name, SITES[name[:-2]][0])
    x = torch.randn(6, in_features, dtype=torch.float64)
    whole = module(x, [1, 2, 2, 1], 6)
    for parameter in module.parameters():
        if experts_of(parameter):
            parameter.data = parameter.data[2:].clone()
    torch.testing.assert_close(module(x[3:], [2, 1], 6), whole[3:])


def test_the_plan_follows_local_experts_and_nominal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(spec: MPOSpec, num_experts: int, rows: int, *args: object, **options: object) -> object:
        asked.append((num_experts, rows, options["force"]))
        return original(spec, num_experts, rows, *args, **options)

    original = moe_config.plan_experts
    monkeypatch.setattr(moe_config, "plan_experts", spy)
    site = replace(SITES["mpo"][0], plan="factored")
    module, in_features = layer_of("mpo-0", site)
    x = torch.zeros(3, in_features, dtype=torch.float64)
    module(x, [0, 0, 3, 0], 64)
    for parameter in module.parameters():
        if experts_of(parameter):
            parameter.data = parameter.data[:1]
    module(x, [3], 0)
    assert asked == [(4, 64, "factored"), (1, 1, "factored")]


def test_roles_and_the_expert_dimension_are_marked() -> None:
    module, _ = layer_of("mpo-0", SITES["mpo"][0])
    marks = {n: (role_of(p), experts_of(p)) for n, p in module.named_parameters()}
    assert marks == {
        "central": (Role.CENTRAL, 0),
        **{f"auxiliaries.{k}": (Role.AUXILIARY, 4) for k in range(4)},
        "bias": (Role.EXPERT, 4),
    }
    spec = SITES["mpo"][0].spec(12, 24)
    assert spec is not None
    shapes = [tuple(p.shape) for p in module.auxiliaries]
    assert shapes == [(4, *shape) for k, shape in enumerate(spec.core_shapes) if k != 2]
    assert tuple(module.central.shape) == spec.core_shapes[2]
    dense, _ = layer_of("dense-0", SITES["dense"][0])
    marks = {n: (role_of(p), experts_of(p)) for n, p in dense.named_parameters()}
    assert marks == {"weight": (Role.EXPERT, 4), "bias": (Role.EXPERT, 4)}


def test_central_tensor_is_one_and_gets_the_sum_of_untied_gradients() -> None:
    module, in_features = layer_of("mpo-0", SITES["mpo"][0])
    assert isinstance(module, MPOExperts)
    counts = [2, 3, 0, 4]
    x = torch.randn(9, in_features, dtype=torch.float64)
    upstream = torch.randn(9, 24, dtype=torch.float64)
    (ours,) = torch.autograd.grad(module(x, counts, 9), [module.central], upstream)
    copies = [module.central.detach().clone().requires_grad_() for _ in counts]
    parts = []
    for e, part in enumerate(x.split(counts)):
        cores = [core[e] for core in module.auxiliaries]
        weight = rebuild([*cores[:2], copies[e], *cores[2:]], module.spec)
        parts.append(part @ weight)
    untied = torch.autograd.grad(torch.cat(parts), copies, upstream)
    torch.testing.assert_close(ours, sum(untied))
    assert float(untied[2].abs().max()) == 0
    assert [role_of(p) for p in module.parameters()].count(Role.CENTRAL) == 1


def test_equal_auxiliaries_make_equal_experts_and_one_entry_moves_a_block() -> None:
    module, in_features = layer_of(
        "mpo-0", MPOExpertSite(start="independent", in_modes=(3, 2, 2), out_modes=(2, 3, 4))
    )
    assert isinstance(module, MPOExperts)
    with torch.no_grad():
        for core in module.auxiliaries:
            core[1] = core[3]
        torch.nn.init.zeros_(module.bias)
        x = torch.randn(5, in_features, dtype=torch.float64)
        rows = torch.cat([x, x])
        y = module(rows, [0, 5, 0, 5], 10)
        torch.testing.assert_close(y[:5], y[5:])
        before = expert_weights(module)[1]
        module.auxiliaries[0][1, 0, 2, 1, 0] += 1
        moved = (expert_weights(module)[1] - before).abs() > 1e-12
    # Entry (i_1, j_1) of the first core moves rows 2 * 4 .. 3 * 4 and columns 12 .. 24, no others.
    assert bool(moved[8:12, 12:].all())
    assert int(moved.sum()) == 4 * 12


@pytest.mark.parametrize("scheme", ["orthogonal", "balanced"])
@pytest.mark.parametrize(
    "spec",
    [
        mpo_spec(64, 96, (4, 2, 2, 2, 2), (2, 2, 4, 3, 2)),
        mpo_spec(64, 96, (4, 4, 4), (6, 4, 4), bonds=(7, 9)),
        # Core 2 is wider (2 * 4 * 2 < 20) and core 4 taller than can be orthonormal.
        mpo_spec(64, 96, (4, 4, 2, 2, 1), (2, 1, 4, 3, 4), bonds=(2, 8, 12, 1)),
    ],
    ids=["full", "truncated", "wide"],
)
def test_start_values_have_the_spread_that_was_asked_for(spec: MPOSpec, scheme: str) -> None:
    squares = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        central, auxiliaries = init_experts(spec, 12, 0.02, scheme=scheme, generator=generator)
        for e in range(12):
            cores = [core[e] for core in auxiliaries]
            c = spec.central_index
            weight = rebuild([*cores[:c], central, *cores[c:]], spec)
            squares.append(float(weight.double().square().mean()))
    # Products of few Gaussian elements scatter widely; the mean over 96 matrices does not.
    tolerance = 0.05 if scheme == "orthogonal" else 0.25
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(0.02, rel=tolerance)


def grams(core: Tensor, is_left: bool) -> tuple[Tensor, int, int]:
    """A^T A of the auxiliary as a matrix towards the central tensor, with its rows and columns."""
    left, _, _, right = core.shape
    matrix = core.double().reshape(-1, right) if is_left else core.double().reshape(left, -1).t()
    return matrix, *matrix.shape


def test_orthogonal_auxiliaries_are_isometries_towards_the_central_tensor() -> None:
    spec = mpo_spec(64, 96, (4, 4, 2, 2, 1), (2, 1, 4, 3, 4), bonds=(2, 8, 12, 1))
    narrow = MPOSpec(spec.in_modes, spec.out_modes, (1, 8, 12, 2), 64, 96)
    generator = torch.Generator().manual_seed(0)
    wide = 0
    for choice in (spec, narrow):
        _, auxiliaries = init_experts(choice, 3, 0.02, generator=generator)
        for k, core in enumerate(auxiliaries):
            for own in core:
                matrix, rows, columns = grams(own, k < 2)
                if rows >= columns:
                    gram, size = matrix.t() @ matrix, columns
                else:
                    gram, size = matrix @ matrix.t() * rows / columns, rows
                    wide += 1
                torch.testing.assert_close(
                    gram, torch.eye(size, dtype=torch.float64), rtol=1e-6, atol=1e-6
                )
    assert wide > 0


def test_first_experts_do_not_depend_on_their_number() -> None:
    for name in ("dense-0", "mpo-0", "asymmetric-0"):
        few, _ = layer_of(name, SITES[name[:-2]][0], num_experts=2)
        many, _ = layer_of(name, SITES[name[:-2]][0], num_experts=5)
        for (key, left), right in zip(few.named_parameters(), many.parameters(), strict=True):
            if key != "bias":
                wanted = right[:2] if experts_of(right) else right
                assert torch.equal(left, wanted), key
        with_own = many.weight if isinstance(many, DenseExperts) else many.auxiliaries[0]
        assert not torch.equal(with_own[0], with_own[1])


def test_dense_experts_have_the_spread_that_was_asked_for() -> None:
    module = DenseExperts(64, 96, 4, bias=False, std=0.02)
    assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert module.bias is None


@pytest.mark.parametrize("name", ["dense-0", "mpo-0", "asymmetric-0"])
def test_sixteen_bit_activations_meet_fp32_parameters(name: str) -> None:
    module, in_features = layer_of(name, SITES[name[:-2]][0])
    module.float()
    x = torch.randn(9, in_features).bfloat16().requires_grad_()
    y = module(x, [3, 0, 4, 2], 9)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    wanted = module(x.detach().float(), [3, 0, 4, 2], 9)
    torch.testing.assert_close(y.float(), wanted, rtol=3e-2, atol=3e-2)


def test_asymmetric_experts_have_three_cores() -> None:
    site = AsymmetricExpertSite(start="independent", in_mode=4, out_mode=6, in_bond=2, out_bond=5)
    module, _ = layer_of("asymmetric-0", site)
    assert isinstance(module, MPOExperts)
    assert [tuple(p.shape) for p in module.parameters() if p.ndim > 2] == [
        (2, 3, 4, 5), (4, 1, 4, 1, 2), (4, 5, 1, 6, 1),
    ]  # fmt: skip


def test_experts_start_as_copies_unless_told_otherwise() -> None:
    alike = AsymmetricExpertSite(in_mode=8, out_mode=8)
    apart = AsymmetricExpertSite(in_mode=8, out_mode=8, start="independent")
    spec = alike.spec(32, 64)
    for site, same in ((alike, True), (apart, False)):
        layer = MPOExperts(spec, site, 3, bias=False, std=0.1, generator=torch.Generator())
        for auxiliary in layer.auxiliaries:
            assert torch.equal(auxiliary[0], auxiliary[2]) == same
            # Copies, not views: every expert moves by itself.
            assert auxiliary.is_contiguous()


def test_merge_precision_of_the_site_reaches_the_plan_and_the_result() -> None:
    base = MPOExpertSite(
        in_modes=(4, 4, 2), out_modes=(4, 8, 2), start="independent", plan="grouped"
    )
    rows = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for precision in ("fp32", "compute"):
        site = replace(base, merge_precision=precision)
        generator = torch.Generator().manual_seed(2)
        layer = MPOExperts(site.spec(32, 64), site, 3, bias=False, std=0.1, generator=generator)
        plan = layer.plan(24, torch.bfloat16, torch.device("cpu"))
        assert plan.merge_precision == precision
        results.append(layer(rows, [8, 10, 6], 24).detach())
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
