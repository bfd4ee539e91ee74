"""Encoders made of others: dense, tensorized, shared over depth or not, adapters folded in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoder_cases import (
    ADAPTER,
    ALL_MPO,
    MIXED,
    OTHER_MPO,
    encoder,
    made,
    scaled,
    trained,
)

from mpotrain.assemble import build_model
from mpotrain.convert.encoder_checks import encoder_problems
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.models.folding import folded_state
from mpotrain.nn.sharing_config import AdapterConfig, StartConfig

DENSE, SHARED = encoder("none"), encoder("all")
NARROW = {"embedding_size": 10}
CENTRAL = encoder("central", sites=ALL_MPO)
IDENTITIES: dict[str, tuple[EncoderConfig, EncoderConfig]] = {
    "albert to depth-shared": (SHARED, CENTRAL),
    "tied vectors": (SHARED, encoder("central", vectors="tied", sites=ALL_MPO)),
    "new adapters": (SHARED, encoder("central", sites=ALL_MPO, adapter=ADAPTER)),
    "groups to as many groups": (encoder("all", 2), encoder("central", 2, sites=ALL_MPO)),
    "one group to two": (SHARED, encoder("central", 2, "tied", sites=ALL_MPO)),
    "a factorised embedding": (
        encoder("all", **NARROW),
        encoder("central", sites=ALL_MPO, **NARROW),
    ),
    "some families": (SHARED, encoder("central", sites=MIXED)),
    "shared cores to depth-shared": (encoder("all", sites=ALL_MPO), CENTRAL),
    "shared cores of other shapes": (encoder("all", sites=OTHER_MPO), CENTRAL),
    "pre-norm": (encoder("all", norm="pre"), encoder("central", norm="pre", sites=ALL_MPO)),
    "depth-shared to dense": (encoder("central", 2, "tied", sites=ALL_MPO), DENSE),
    "adapters folded": (encoder("central", sites=ALL_MPO, adapter=ADAPTER), DENSE),
    "adapters of a dense model folded": (encoder("none", adapter=ADAPTER), DENSE),
    "adapters of shared layers folded": (encoder("all", adapter=ADAPTER), DENSE),
    "adapters folded, others begun": (
        encoder("none", adapter=ADAPTER),
        encoder("none", adapter=AdapterConfig(rank=2)),
    ),
    "adapters folded into cores": (
        encoder("central", sites=ALL_MPO, adapter=ADAPTER),
        encoder("none", sites=ALL_MPO),
    ),
    "adapters kept by dense layers": (
        encoder("central", sites=ALL_MPO, adapter=ADAPTER),
        encoder("none", adapter=replace(ADAPTER, families=("c_fc", "query"), std=0.5)),
    ),
    "dense to tensorized": (DENSE, encoder("none", sites=ALL_MPO)),
    "other core shapes": (encoder("none", sites=ALL_MPO), encoder("none", sites=OTHER_MPO)),
    "tensorized to dense": (encoder("none", sites=OTHER_MPO), DENSE),
    "shared to untied": (SHARED, DENSE),
    "shared to tensorized": (SHARED, encoder("none", sites=ALL_MPO)),
    "shared cores to dense shared": (encoder("all", 2, sites=ALL_MPO), encoder("all", 2)),
    "untying the central tensors": (CENTRAL, encoder("none", sites=ALL_MPO)),
    "splitting groups": (CENTRAL, encoder("central", 4, sites=ALL_MPO)),
    "untying the vectors": (encoder("central", vectors="tied", sites=ALL_MPO), CENTRAL),
    "tensorized embedding": (
        DENSE,
        encoder("none", sites=replace(ALL_MPO, embedding=OTHER_MPO.query.__class__(
            in_modes=(5, 3, 4), out_modes=(4, 3, 2)))),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), IDENTITIES.values(), ids=list(IDENTITIES))
def test_the_new_encoder_computes_what_the_old_one_did(
    old: EncoderConfig, new: EncoderConfig
) -> None:
    filled, _, difference = made(new, trained(old))
    assert filled.is_exact
    assert difference < 1e-5
    assert all(error.error < 1e-5 and not error.truncated for error in filled.errors)


SAME = [
    SHARED,
    DENSE,
    encoder("central", 2, "tied", sites=ALL_MPO, adapter=ADAPTER),
    encoder("none", sites=MIXED, adapter=ADAPTER, pair_head=False, **NARROW),
    encoder("all", 2, sites=ALL_MPO, norm="pre"),
    # What was trained has the size that it was trained to: nothing is scaled again.
    encoder("central", sites=ALL_MPO, start=scaled("per_side")),
    encoder("none", sites=ALL_MPO, start=scaled("per_tensor")),
]


@pytest.mark.parametrize("config", SAME, ids=range(len(SAME)))
def test_the_same_network_is_copied_bit_for_bit(config: EncoderConfig) -> None:
    source = trained(config)
    filled, _, difference = made(config, source)
    assert difference == 0
    assert filled.errors == filled.notes == []
    assert filled.weights.keys() == source.weights.keys()
    assert all(torch.equal(filled.weights[name], t) for name, t in source.weights.items())


@pytest.mark.parametrize("old", [CENTRAL, encoder("all", 2, sites=MIXED, adapter=ADAPTER)])
def test_dense_layers_are_those_that_the_model_itself_folds(old: EncoderConfig) -> None:
    source = trained(old)
    model = build_model(old, seed=0, dtype="fp32")
    model.load_state_dict(dict(source.weights))
    assert isinstance(model, Encoder)
    plain, state = folded_state(model)
    weights = made(plain, source)[0].weights
    assert weights.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-7)


def test_each_family_is_decomposed_once_for_each_group() -> None:
    assert [e.name for e in made(CENTRAL, trained(SHARED))[0].errors] == [
        f"blocks.0.{name}"
        for name in ("attention.query", "attention.key", "attention.value", "attention.out",
                     "ffn.c_fc", "ffn.c_proj")
    ]  # fmt: skip
    assert len(made(encoder("none", sites=ALL_MPO), trained(SHARED))[0].errors) == 6
    assert len(made(encoder("none", sites=ALL_MPO), trained(DENSE))[0].errors) == 24
    filled, model, _ = made(encoder("central", 2, sites=ALL_MPO), trained(encoder("all", 2)))
    assert len(filled.errors) == 12
    banks = [model.get_parameter(f"bank.c_fc.{group}") for group in (0, 1)]
    assert not torch.equal(*banks)


@pytest.mark.parametrize("kind", ["per_side", "per_tensor"])
def test_a_deeper_model_repeats_the_shared_layer_and_scales_the_new_ones(kind: str) -> None:
    source = trained(SHARED)
    new = encoder("central", num_layers=8, sites=ALL_MPO, start=scaled(kind, 4))
    filled, _, difference = made(new, source)
    assert not filled.is_exact
    assert difference > 1e-3
    assert filled.notes == [
        "8 layers made of 4",
        f"auxiliary tensors of layers from 4 on scaled {kind} for 8 layers",
    ]
    # One auxiliary on each side: both ways of scaling are (2L)^(-1/4) = 1/2 for L = 8.
    for family in ("attention.query", "ffn.c_proj"):
        first = filled.weights[f"blocks.0.{family}.auxiliaries.1"]
        assert torch.equal(filled.weights[f"blocks.3.{family}.auxiliaries.1"], first)
        assert torch.equal(filled.weights[f"blocks.4.{family}.auxiliaries.1"], first / 2)
    assert sum(1 for name in filled.weights if name.startswith("bank.")) == 6
    # The first four layers are those of an equally deep model.
    shallow = made(CENTRAL, source)[0].weights
    assert all(torch.equal(filled.weights[name], tensor) for name, tensor in shallow.items())


def test_groups_of_a_deeper_model_are_at_the_same_height() -> None:
    source = trained(encoder("all", 2))
    new = encoder("central", 4, num_layers=8, sites=ALL_MPO)
    filled, model, _ = made(new, source)
    assert filled.notes == ["8 layers made of 4"]
    for layer in range(8):
        bias = model.get_parameter(f"blocks.{layer}.ffn.c_fc.bias")
        assert torch.equal(bias, source.weights[f"blocks.{layer // 4}.ffn.c_fc.bias"])
    banks = [model.get_parameter(f"bank.value.{group}") for group in range(4)]
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[1], banks[2])
    # A fully shared model may also be made deeper as such.
    assert made(encoder("all", 2, num_layers=8), source)[0].notes == ["8 layers made of 4"]


def test_scaling_without_more_layers_is_told_and_not_taken_for_an_error() -> None:
    new = encoder("central", sites=ALL_MPO, start=scaled("per_side", 2))
    filled, _, difference = made(new, trained(SHARED))
    assert (filled.is_exact, difference > 1e-3) == (False, True)
    untied = encoder("none", sites=ALL_MPO, start=scaled("per_side", 2))
    weights = made(untied, trained(SHARED))[0].weights
    for name, tensor in filled.weights.items():
        if ".auxiliaries." in name:
            module, _, number = name.rpartition(".auxiliaries.")
            core = weights[f"{module}.cores.{0 if number == '0' else 2}"]
            assert torch.equal(core, tensor), name
    # Layers that were their own before are not scaled.
    assert made(untied, trained(DENSE))[0].is_exact
    # All layers unscaled: nothing changes.
    whole = encoder("central", sites=ALL_MPO, start=scaled("per_side", 4))
    assert made(whole, trained(SHARED))[0].is_exact


def test_deeper_layers_may_keep_the_auxiliaries_that_they_were_drawn_with() -> None:
    """The main text of Liu et al. 2023: Xavier draws times (2L)^(-1/4) beside a trained core."""
    xavier = {
        family: replace(getattr(ALL_MPO, family), init="xavier")
        for family in ("query", "key", "value", "attention_out", "c_fc", "c_proj")
    }
    start = replace(scaled("per_tensor", 4), deeper="drawn")
    new = encoder("central", num_layers=8, sites=EncoderSites(**xavier), start=start)
    source = trained(SHARED)
    filled, _, _ = made(new, source)
    assert filled.notes[-1] == "auxiliary tensors of layers from 4 on drawn anew"
    assert not filled.is_exact
    copied = made(replace(new, start=scaled("per_tensor", 4)), source)[0].weights
    drawn = build_model(new, seed=9, dtype="fp32").state_dict()
    for name, tensor in filled.weights.items():
        is_deep = ".auxiliaries." in name and int(name.split(".")[1]) >= 4
        assert torch.equal(tensor, drawn[name] if is_deep else copied[name]), name
        assert not is_deep or not torch.equal(tensor, copied[name]), name
    plain = build_model(replace(new, start=StartConfig()), seed=9, dtype="fp32").state_dict()
    name = "blocks.7.ffn.c_fc.auxiliaries.0"
    assert torch.allclose(filled.weights[name], plain[name] * 16**-0.25)


def test_truncated_bonds_are_told_with_their_loss() -> None:
    small = replace(ALL_MPO, c_fc=replace(ALL_MPO.c_fc, cap=4))
    filled, _, difference = made(encoder("central", sites=small), trained(SHARED))
    lost = [error for error in filled.errors if error.truncated]
    assert [(error.name, error.bonds) for error in lost] == [("blocks.0.ffn.c_fc", (4, 4))]
    assert lost[0].error > 0.1
    assert difference > 1e-3


def test_heads_that_only_one_side_has() -> None:
    source = trained(encoder("none", pair_head=False))
    filled, model, difference = made(DENSE, source)
    assert difference == 0
    assert filled.notes == ["not in the source, drawn anew: pair_head, pooler"]
    assert float(model.get_parameter("pooler.weight").detach().std()) > 0.01
    filled, _, difference = made(encoder("none", pair_head=False), trained(DENSE))
    assert (filled.notes, difference) == (["pooler and pair_head of the source left out"], 0)


REFUSED = {
    "own layers do not become one": (DENSE, SHARED, 'scope: is "all", but layers', "norms of"),
    "nor two groups one": (encoder("all", 2), SHARED, 'scope: is "all", but layers', "norms"),
    "nor get a common central tensor": (DENSE, CENTRAL, "have query matrices of their own; no", ""),
    "vectors cannot be tied": (
        CENTRAL, encoder("central", vectors="tied", sites=ALL_MPO), 'vectors: is "tied"', "",
    ),
    "adapters cannot be folded into shared tensors": (
        encoder("central", sites=ALL_MPO, adapter=ADAPTER), CENTRAL,
        "query matrices of their own (adapters that model.adapter has not)", "c_fc matrices",
    ),
    "other core shapes": (
        encoder("central", sites=OTHER_MPO), CENTRAL, "query matrices of their own (of other", "",
    ),
    "groups cannot be joined": (
        encoder("central", 4, sites=ALL_MPO), encoder("central", 2, sites=ALL_MPO),
        "groups: is 2, but the source has 4", "",
    ),
    "adapters belong to layers": (
        encoder("all", adapter=ADAPTER), encoder("none", num_layers=8),
        "num_layers: is 8, the source has 4 layers with adapters", "",
    ),
    "deepnorm": (
        SHARED, encoder("central", sites=ALL_MPO, start=replace(scaled("none"), deepnorm=True)),
        "start.deepnorm: is true, the source has false", "",
    ),
    "biases": (
        DENSE, encoder("none", sites=replace(ALL_MPO, key=replace(ALL_MPO.key, bias=False))),
        "sites.key.bias: is False", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "one", "other"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_made_is_refused_with_its_key(
    old: EncoderConfig, new: EncoderConfig, one: str, other: str
) -> None:
    problems = encoder_problems(old, new)
    assert all(line.startswith("model.") for line in problems)
    assert one in "\n".join(problems)
    assert other in "\n".join(problems)
