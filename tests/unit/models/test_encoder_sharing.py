"""What depth sharing keeps: one storage, summed gradients, identities, folding, start values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.models.encoder_cases import (
    ADAPTER,
    CENTRAL,
    CENTRAL_INDEPENDENT,
    CENTRAL_TIED,
    EVERY_KIND,
    FIVE_CORES,
    SQUARE,
    batch,
    build,
    encoder_config,
    matrix,
)

from mpotrain.models.depth_start import depth_shared_tensors
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import MODULES, EncoderConfig, EncoderSites
from mpotrain.models.folding import folded_state
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.sharing_config import BLOCK_FAMILIES, SharingConfig, StartConfig
from mpotrain.tensor.decompose import decompose

CENTRAL_INDEX = 2


def weights(model: Encoder) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def load(model: Encoder, values: dict[str, Tensor]) -> Encoder:
    model.load_state_dict(values, strict=True)
    return model


def untied(model: Encoder) -> Encoder:
    """The same network with copies of everything shared."""
    config = replace(model.config, sharing=SharingConfig())
    have, values = weights(model), {}
    for info in config.parameters():
        name = info.name
        if name not in have:
            _, layer, rest = name.split(".", 2)
            group = model.config.group(int(layer))
            module, _, leaf = rest.rpartition(".")
            family = next((f for f, m in MODULES.items() if rest.startswith(m + ".")), module)
            if ".cores." in name:
                k = int(leaf)
                source = f"blocks.{layer}.{MODULES[family]}.auxiliaries.{k - (k > CENTRAL_INDEX)}"
                name = f"bank.{family}.{group}" if k == CENTRAL_INDEX else source
            else:
                name = f"tied.{group}.{family}_{leaf}"
        values[info.name] = have[name].clone()
    return load(build(config), values)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_family_has_one_central_tensor_for_all_layers_of_a_group(groups: int) -> None:
    config = encoder_config(sharing=SharingConfig(scope="central", groups=groups))
    model = build(config)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert len({p.data_ptr() for p in named.values()}) == len(named)
    for family in BLOCK_FAMILIES:
        seen = {model.given(layer)[family]["central"].data_ptr() for layer in range(4)}
        assert len(seen) == groups
        assert seen == {named[f"bank.{family}.{g}"].data_ptr() for g in range(groups)}


@pytest.mark.parametrize("sharing", [CENTRAL, CENTRAL_TIED])
def test_a_layer_more_adds_what_is_its_own(sharing: SharingConfig) -> None:
    sizes = []
    for layers in (4, 6):
        config = encoder_config(sharing=sharing, num_layers=layers)
        sizes.append(sum(p.numel() for p in build(config).parameters()))
    specs = [getattr(FIVE_CORES, f).spec(*config.site_shapes()[f]) for f in BLOCK_FAMILIES]
    own = sum(
        spec.num_parameters - torch.Size(spec.core_shapes[CENTRAL_INDEX]).numel() for spec in specs
    )
    if sharing.vectors == "own":
        own += sum(spec.out_features for spec in specs) + 4 * 16
    assert sizes[1] - sizes[0] == 2 * own


@pytest.mark.parametrize("sharing", [CENTRAL, CENTRAL_TIED, CENTRAL_INDEPENDENT])
def test_untying_leaves_the_forward_pass_and_splits_the_gradient(sharing: SharingConfig) -> None:
    tied = build(encoder_config(sharing=sharing, adapter=ADAPTER))
    apart, data = untied(tied), batch()
    one, other = tied(data), apart(data)
    torch.testing.assert_close(one.objective, other.objective, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tied.hidden(data), apart.hidden(data), rtol=1e-12, atol=1e-12)
    one.objective.backward()
    other.objective.backward()
    split = {name: p.grad for name, p in apart.named_parameters()}
    config = tied.config
    num_checked = 0
    for name, parameter in tied.named_parameters():
        kind, *path = name.split(".")
        if kind == "bank":
            family, group = path[0], int(path[1])
            leaf = f"{MODULES[family]}.cores.{CENTRAL_INDEX}"
        elif kind == "tied":
            group, (owner, last) = int(path[0]), path[1].rsplit("_", 1)
            leaf = f"{MODULES.get(owner, owner)}.{last}"
        else:
            continue
        parts = [split[f"blocks.{n}.{leaf}"] for n in range(4) if config.group(n) == group]
        assert len(parts) == 4 // config.sharing.groups
        torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-10, atol=1e-12)
        # The gradient of a key's bias is zero but for rounding.
        assert "key_bias" in name or not torch.allclose(parameter.grad, parts[0])
        num_checked += 1
    assert num_checked >= 6


def shared_dense(groups: int) -> Encoder:
    """An ALBERT whose groups, if there are several, have equal weights."""
    sharing = SharingConfig(scope="all", groups=groups)
    model = build(encoder_config(sites=EncoderSites(), sharing=sharing))
    values = weights(model)
    first = {name.replace("blocks.1.", "blocks.0."): name for name in values}
    return load(model, values | {first[name]: values[name] for name in first})


def decomposed(source: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """All cores of an encoder from one decomposition of every family."""
    values: dict[str, Tensor] = {}
    for family in BLOCK_FAMILIES:
        site, weight = getattr(FIVE_CORES, family), source[f"blocks.0.{MODULES[family]}.weight"]
        cores = decompose(weight.t(), site.in_modes, site.out_modes).cores
        values |= depth_shared_tensors(config, family, cores)
    return values


def with_vectors_of(source: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Biases, norms and everything outside of the layers from the first block of a source."""
    result = {}
    for name, value in values.items():
        wanted = name
        if name.startswith("tied."):
            owner, leaf = name.split(".", 2)[2].rsplit("_", 1)
            wanted = f"blocks.0.{MODULES.get(owner, owner)}.{leaf}"
        elif name.startswith("blocks."):
            wanted = "blocks.0." + name.split(".", 2)[2]
        result[name] = source.get(wanted, value)
    return result


@pytest.mark.parametrize("vectors", ["own", "tied"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_decomposed_shared_model_computes_the_same(groups: int, vectors: Any) -> None:
    """An ALBERT of equal depth becomes MPOBERT: adapters contribute nothing at start."""
    dense, data = shared_dense(groups), batch()
    source = weights(dense)
    sharing = SharingConfig(scope="central", groups=groups, vectors=vectors)
    model = build(encoder_config(sharing=sharing, adapter=ADAPTER), shaken=False)
    values = with_vectors_of(source, weights(model) | decomposed(source, model.config))
    torch.testing.assert_close(
        load(model, values).hidden(data), dense.hidden(data), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    "sharing", [CENTRAL, SharingConfig(), SharingConfig(scope="all", groups=4)]
)
def test_layers_beyond_the_source_are_made_smaller(sharing: SharingConfig) -> None:
    source = weights(shared_dense(1))
    start = StartConfig(auxiliary_scale="per_side", unscaled_layers=2)
    config = encoder_config(sharing=sharing, start=start)
    model = build(config)
    load(model, weights(model) | decomposed(source, config))
    for layer, factor in enumerate((1.0, 1.0, 8**-0.5, 8**-0.5)):
        for family in BLOCK_FAMILIES:
            weight = source[f"blocks.0.{MODULES[family]}.weight"].t()
            torch.testing.assert_close(
                matrix(model, layer, family).detach(), factor * weight, rtol=1e-9, atol=1e-11
            )


def test_cores_of_other_shapes_are_refused() -> None:
    config = encoder_config(sharing=CENTRAL)
    with pytest.raises(ValueError, match="query: the cores have the shapes"):
        depth_shared_tensors(config, "query", [torch.zeros(1, 4, 4, 1)])
    dense = encoder_config(sites=EncoderSites(query=SQUARE), sharing=CENTRAL)
    with pytest.raises(ValueError, match="c_fc is dense"):
        depth_shared_tensors(dense, "c_fc", [])


@pytest.mark.parametrize("config", EVERY_KIND)
def test_a_folded_encoder_is_dense_and_computes_the_same(config: EncoderConfig) -> None:
    config = replace(config, start=StartConfig(deepnorm=config.norm == "post"))
    model, data = build(config).eval(), batch()
    folded, state = folded_state(model)
    assert folded.problems("model") == []
    assert not folded.has_central_tensors()
    assert (folded.sharing, folded.adapter) == (SharingConfig(), None)
    assert {name: tuple(v.shape) for name, v in state.items()} == {
        info.name: info.shape for info in folded.parameters()
    }
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(value.data_ptr() in own for value in state.values())
    dense = load(build(folded).eval(), state)
    got, expected = dense(data, return_logits=True), model(data, return_logits=True)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.loss_sum, expected.loss_sum, rtol=1e-9, atol=1e-9)


def test_folding_changes_single_precision_outputs_by_less_than_1e_6() -> None:
    config = encoder_config(sharing=CENTRAL_TIED, adapter=ADAPTER, init_std=0.05)
    model = build(config).float().eval()
    model.compute_dtype = torch.float32
    folded, state = folded_state(model)
    dense = load(Encoder(folded, seed=0), state).eval()
    with torch.no_grad():
        wanted = model.hidden(batch())
        assert (dense.hidden(batch()) - wanted).abs().max() < 1e-6 * wanted.abs().max()


LARGE: dict[str, Any] = {"hidden_size": 64, "ffn_size": 256, "embedding_size": None}
SQUARE_64 = MPOSite(in_modes=(4, 4, 4), out_modes=(4, 4, 4))
WIDE_64 = MPOSite(in_modes=(4, 4, 4), out_modes=(4, 8, 8))
NARROW_64 = MPOSite(in_modes=(4, 4, 4, 4), out_modes=(4, 2, 2, 4))
BY_RANK = TTMSite(rank=32)


def sites_with(init: Any) -> EncoderSites:
    square, wide, narrow = (replace(site, init=init) for site in (SQUARE_64, WIDE_64, NARROW_64))
    return EncoderSites(
        query=square, key=square, value=replace(BY_RANK, init=init), attention_out=square,
        c_fc=wide, c_proj=narrow,
    )  # fmt: skip


@pytest.mark.parametrize("init", ["gaussian_qr", "balanced", "xavier"])
@pytest.mark.parametrize("start", ["copies", "independent"])
def test_matrices_of_all_layers_start_with_the_wanted_spread(start: Any, init: Any) -> None:
    sharing = SharingConfig(scope="central", groups=32, start=start)
    config = encoder_config(
        num_layers=32, sharing=sharing, sites=sites_with(init), init_std=0.02, **LARGE
    )
    model = Encoder(config, seed=0)
    for family, (rows, columns) in config.site_shapes().items():
        if family == "embedding":
            continue
        wanted = (2.0 / (rows + columns)) ** 0.5 if init == "xavier" else 0.02
        draws = [matrix(model, layer, family).detach() for layer in range(32)]
        # Small outer cores make the norm of a single draw fluctuate; its mean square is exact.
        got = torch.stack([draw.square().mean() for draw in draws]).mean().sqrt()
        assert float(got) == pytest.approx(wanted, rel=0.07), family


def test_layers_start_as_copies_or_apart() -> None:
    for start, alike in (("copies", True), ("independent", False)):
        sharing = SharingConfig(scope="central", groups=2, start=start)
        model = Encoder(encoder_config(sharing=sharing), seed=0)
        one, other = (matrix(model, layer, "c_fc").detach() for layer in (0, 1))
        assert torch.equal(one, other) == alike
        assert not torch.allclose(one, matrix(model, 2, "c_fc").detach())  # another group


@pytest.mark.parametrize(
    "sharing", [CENTRAL, SharingConfig(), SharingConfig(scope="all", groups=4)]
)
@pytest.mark.parametrize(("scale", "factor"), [("per_side", 8**-0.5), ("per_tensor", 8**-1.0)])
def test_deep_layers_start_smaller(sharing: SharingConfig, scale: Any, factor: float) -> None:
    config = encoder_config(sharing=sharing)
    plain = Encoder(config, seed=0)
    start = StartConfig(auxiliary_scale=scale, unscaled_layers=3)
    deep = Encoder(replace(config, start=start), seed=0)
    for layer in range(4):
        for family in BLOCK_FAMILIES:
            # With two auxiliary tensors on each side; four in a network of four layers.
            ratio = matrix(deep, layer, family).norm() / matrix(plain, layer, family).norm()
            wanted = factor if layer == 3 else 1.0
            assert ratio.item() == pytest.approx(wanted, rel=1e-5)
    same = [n for n, p in weights(deep).items() if torch.equal(p, weights(plain)[n])]
    assert {n for n in weights(plain) if n not in same} == {
        n for n in weights(plain)
        if n.startswith("blocks.3.") and (".auxiliaries." in n or ".cores." in n)
        and not n.endswith(f".cores.{CENTRAL_INDEX}")
    }  # fmt: skip


@pytest.mark.parametrize("init", ["gaussian_qr", "balanced", "xavier"])
@pytest.mark.parametrize(
    "sharing",
    [CENTRAL, CENTRAL_INDEPENDENT, SharingConfig(), SharingConfig(scope="all", groups=4)],
)
def test_deepnorm_starts_four_families_smaller(sharing: SharingConfig, init: Any) -> None:
    """Whatever the initialiser, also the one that does not read the wanted deviation."""
    config = encoder_config(sharing=sharing, sites=sites_with(init), **LARGE)
    plain = Encoder(config, seed=0)
    deep = Encoder(replace(config, start=StartConfig(deepnorm=True)), seed=0)
    for family in BLOCK_FAMILIES:
        ratio = matrix(deep, 1, family).norm() / matrix(plain, 1, family).norm()
        wanted = 1.0 if family in ("query", "key") else 32**-0.25
        assert ratio.item() == pytest.approx(wanted, rel=1e-5), family


def test_start_values_of_a_layer_do_not_depend_on_the_depth() -> None:
    short, long = (
        weights(Encoder(encoder_config(sharing=CENTRAL, num_layers=n, adapter=ADAPTER), seed=4))
        for n in (4, 6)
    )
    assert all(torch.equal(value, long[name]) for name, value in short.items())


def test_adapters_start_at_zero_and_train() -> None:
    config = encoder_config(sharing=CENTRAL)
    plain, added = (build(replace(config, adapter=a), shaken=False) for a in (None, ADAPTER))
    data = batch()
    assert torch.equal(plain.hidden(data), added.hidden(data))
    added(data).objective.backward()
    moved = added.get_parameter("adapters.3.value.u").grad
    assert moved is not None
    assert bool(moved.any())
    spread = torch.cat([p.detach().flatten() for n, p in added.named_parameters()
                        if n.startswith("adapters") and n.endswith(".d")]).std()  # fmt: skip
    assert float(spread) == pytest.approx(0.3, rel=0.1)
