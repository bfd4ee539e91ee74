"""FLOPs of encoders, counted by hand: shared blocks, adapters, rows that meet each matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.models.encoder_cases import CENTRAL, FIVE_CORES, encoder_config

from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig
from mpotrain.sample import SampleLengths

LENGTHS = SampleLengths(inputs=50, targets=50, predicted=8, pairs=2)
LAYERS, HIDDEN, FFN, WIDTH, VOCABULARY = 4, 16, 32, 8, 40
LAYER_WEIGHTS = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN
ROWS = LAYERS * LAYER_WEIGHTS * 50 + WIDTH * HIDDEN * 50
ROWS += (HIDDEN * HIDDEN + 2 * HIDDEN) * 2  # pooler and pair head
ROWS += (HIDDEN * WIDTH + WIDTH * VOCABULARY) * 8  # masked tokens alone
ATTENTION = LAYERS * 12 * HIDDEN * 50 * 50
"""Scores and values: 2 products of 2 T T H each, every query with every key, three times."""


@pytest.mark.parametrize(
    "config",
    [
        encoder_config(sites=EncoderSites()),
        encoder_config(sites=FIVE_CORES, sharing=CENTRAL),
        encoder_config(sharing=SharingConfig(scope="all", groups=2)),
        encoder_config(sharing=SharingConfig(scope="all")),
    ],
)
def test_flops_do_not_depend_on_what_layers_share(config: EncoderConfig) -> None:
    assert config.flops_per_sample(LENGTHS) == 6 * ROWS + ATTENTION
    assert config.attention_flops(LENGTHS) == ATTENTION
    assert config.flops_per_token(LENGTHS) == (6 * ROWS + ATTENTION) // 50


def test_encoders_without_map_and_pair_head_have_fewer_matrices() -> None:
    config = encoder_config(embedding_size=None, pair_head=False)
    rows = LAYERS * LAYER_WEIGHTS * 50 + (HIDDEN * HIDDEN + HIDDEN * VOCABULARY) * 8
    assert config.flops_per_sample(LENGTHS) == 6 * rows + ATTENTION


@pytest.mark.parametrize("sharing", [SharingConfig(), SharingConfig(scope="all", groups=2)])
def test_adapters_of_every_layer_cost_six_flops_per_weight_and_row(sharing: SharingConfig) -> None:
    plain = encoder_config(sharing=sharing)
    adapted = replace(plain, adapter=AdapterConfig(rank=3, families=("query", "value", "c_fc")))
    weights = 3 * (2 * (HIDDEN + HIDDEN) + (HIDDEN + FFN))
    assert plain.adapter_flops(LENGTHS) == 0
    assert adapted.adapter_flops(LENGTHS) == 6 * LAYERS * weights * 50
    added = adapted.flops_per_sample(LENGTHS) - plain.flops_per_sample(LENGTHS)
    assert added == 6 * LAYERS * weights * 50
