"""Encoder sizes without torch: published numbers, and equality with the built model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from unit.models.encoder_cases import (
    CENTRAL,
    EVERY_KIND,
    FIVE_CORES,
    encoder_config,
)

from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.config import DenseSite, MPOSite
from mpotrain.nn.roles import role_of
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig, StartConfig


@pytest.mark.parametrize("config", EVERY_KIND)
def test_foretold_parameters_are_those_of_the_built_model(config: EncoderConfig) -> None:
    assert config.problems("model") == []
    model = Encoder(config, seed=0)
    built = {n: (tuple(p.shape), str(role_of(p))) for n, p in model.named_parameters()}
    foretold = {info.name: (info.shape, info.role) for info in config.parameters()}
    assert built == foretold
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    assert list(model.buffers()) == []


def sites(hidden: tuple[int, ...], ffn: tuple[int, ...]) -> EncoderSites:
    square = MPOSite(in_modes=hidden, out_modes=hidden)
    wide = MPOSite(in_modes=hidden, out_modes=ffn)
    narrow = MPOSite(in_modes=ffn, out_modes=hidden)
    return EncoderSites(
        query=square, key=square, value=square, attention_out=square, c_fc=wide, c_proj=narrow
    )


def published(**changes: Any) -> EncoderConfig:
    settings: dict[str, Any] = {
        "vocab_size": 30000,
        "context_length": 512,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "ffn_size": 3072,
        "embedding_size": 128,
        "sites": sites((4, 4, 4, 4, 3), (4, 4, 8, 6, 4)),
        "sharing": SharingConfig(scope="central", vectors="tied"),
    }
    return EncoderConfig(**(settings | changes))


ADAPTER_8, ADAPTER_4 = AdapterConfig(rank=8), AdapterConfig(rank=4)
DEEP: dict[str, Any] = {
    "hidden_size": 1024,
    "num_layers": 48,
    "num_heads": 16,
    "ffn_size": 4096,
    "sites": sites((4, 4, 4, 4, 4), (4, 4, 8, 8, 4)),
}
OWN = SharingConfig(scope="central")
THREE = SharingConfig(scope="central", groups=3)
ALBERT = published(sites=EncoderSites(), sharing=SharingConfig(scope="all"))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (published(), 19_413_936),
        (published(adapter=ADAPTER_8), 20_003_760),
        (published(adapter=ADAPTER_4), 19_708_848),
        (ALBERT, 11_683_584),
    ],
)
def test_published_counts_of_twelve_layers(config: EncoderConfig, count: int) -> None:
    assert config.body_parameters() == count


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (published(**DEEP, sharing=OWN), 75.0),
        (published(**DEEP, sharing=SharingConfig(scope="central", vectors="tied")), 74.46),
        (published(**DEEP, sharing=replace(THREE, vectors="tied")), 99.6),
        (published(**DEEP, sharing=THREE), 100.2),
    ],
)
def test_published_counts_of_48_layers(config: EncoderConfig, millions: float) -> None:
    assert config.body_parameters() == pytest.approx(millions * 1e6, rel=2e-3)


def test_a_layer_of_the_published_sizes_adds_its_auxiliary_tensors() -> None:
    for settings, own in (({}, 644_196), (DEEP, 1_182_720)):
        short, long = (published(**settings | {"num_layers": n}) for n in (12, 24))
        assert long.num_parameters() - short.num_parameters() == 12 * own


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sharing": SharingConfig(scope="central", groups=3)}, "model.sharing.groups"),
        ({"sharing": SharingConfig(scope="all", groups=0)}, "model.sharing.groups"),
        ({"sharing": CENTRAL, "sites": EncoderSites()}, "model.sharing.scope"),
        ({"sharing": SharingConfig(vectors="tied")}, "model.sharing.vectors"),
        ({"start": StartConfig(unscaled_layers=5)}, "model.start.unscaled_layers"),
        (
            {"sharing": SharingConfig(scope="all"), "start": StartConfig(unscaled_layers=2)},
            "model.start.unscaled_layers",
        ),
        ({"norm": "pre", "start": StartConfig(deepnorm=True)}, "model.start.deepnorm"),
        (
            {"sites": EncoderSites(), "start": StartConfig(auxiliary_scale="per_side")},
            "model.start.auxiliary_scale",
        ),
        ({"adapter": AdapterConfig(rank=0)}, "model.adapter.rank"),
        ({"adapter": AdapterConfig(rank=16)}, "model.adapter.rank"),
        ({"start": StartConfig(unscaled_layers=2)}, "model.start.unscaled_layers"),
        ({"sharing": SharingConfig(scope="all", groups=5)}, "model.sharing.groups"),
        ({"num_heads": 3}, "model.num_heads"),
        ({"sites": replace(FIVE_CORES, c_fc=FIVE_CORES.c_proj)}, "model.sites.c_fc"),
        ({"sites": EncoderSites(embedding=DenseSite()), "embedding_size": 0},
         "model.embedding_size"),
    ],
)  # fmt: skip
def test_impossible_encoders_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    found = encoder_config(**changes).problems("model")
    assert any(line.startswith(f"{key}: ") for line in found), found
    assert encoder_config().problems("model") == []


def keys_of(config: EncoderConfig) -> list[str]:
    return [line.partition(": ")[0].removeprefix("model.") for line in config.problems("model")]


def test_start_without_effect_is_refused_alone() -> None:
    for start in (
        StartConfig(auxiliary_scale="per_side", unscaled_layers=2),
        StartConfig(auxiliary_scale="per_side", unscaled_layers=4),
        StartConfig(deeper="drawn", unscaled_layers=2),
    ):
        assert encoder_config(start=start).problems("model") == []
    assert keys_of(encoder_config(start=StartConfig(unscaled_layers=1))) == [
        "start.unscaled_layers"
    ]


def test_adapters_are_narrower_than_each_of_their_matrices() -> None:
    for rank, families, wide in (
        (15, ("query", "c_fc"), 16),
        (16, ("c_proj", "c_fc"), 24),
    ):
        adapter = AdapterConfig(rank=rank, families=families)  # type: ignore[arg-type]
        config = encoder_config(
            hidden_size=wide, sites=EncoderSites(), adapter=adapter, embedding_size=None
        )
        assert config.problems("model") == []
    narrow = encoder_config(
        ffn_size=12, sites=EncoderSites(), adapter=AdapterConfig(rank=12, families=("key", "c_fc"))
    )
    (line,) = narrow.problems("model")
    assert line == (
        "model.adapter.rank: 12 is not below the smaller side of c_fc, so nothing is low-rank "
        "there; take less than 12"
    )


def test_a_wrong_size_hides_no_other_problem() -> None:
    found = keys_of(encoder_config(num_heads=0, sharing=SharingConfig(groups=5)))
    assert set(found) == {"num_heads", "sharing.groups"}
    found = keys_of(
        encoder_config(
            num_layers=0, dropout=1.0, num_heads=3, embedding_size=0,
            sharing=SharingConfig(scope="all", vectors="tied"),
            start=StartConfig(deeper="drawn", deepnorm=True), norm="pre",
            adapter=AdapterConfig(rank=16, families=()),
            sites=replace(FIVE_CORES, c_fc=FIVE_CORES.c_proj),
        )
    )  # fmt: skip
    assert sorted(found) == sorted([
        "num_layers", "dropout", "embedding_size", "num_heads", "sharing.vectors",
        "start.deeper", "adapter.families", "sites.c_fc", "start.deepnorm",
    ])  # fmt: skip
    # What needs the hidden size waits, and nothing else does.
    found = keys_of(
        encoder_config(
            hidden_size=0, num_heads=3, sharing=SharingConfig(scope="central", groups=3),
            sites=EncoderSites(embedding=MPOSite(in_modes=(2, 2), out_modes=(2, 4))),
        )
    )  # fmt: skip
    assert set(found) == {
        "hidden_size", "sharing.groups", "sites.embedding", "sharing.scope",
    }  # fmt: skip


@pytest.mark.parametrize("groups", [-1, 0, 3, 5])
@pytest.mark.parametrize("scope", ["none", "central", "all"])
def test_impossible_groups_are_told_once_beside_the_rest(scope: Any, groups: int) -> None:
    sharing = SharingConfig(scope=scope, groups=groups, start="independent")
    found = keys_of(encoder_config(sharing=sharing, start=StartConfig(unscaled_layers=5)))
    assert "sharing.groups" in found
    assert "start.unscaled_layers" in found
    assert ("sharing.start" in found) == (scope != "central")
