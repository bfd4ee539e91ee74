"""Start weights: every seed has its own, every parameter has its own, and they never change."""

import pytest
import torch
import xxhash
from torch import nn

from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.seeds import start_seed


def build(kind: str, seed: int) -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_size": 16}
    if kind == "gpt2":
        return GPT2(GPT2Config(context_length=8, **sizes), seed=seed)
    if kind == "encoder":
        return Encoder(EncoderConfig(context_length=8, **sizes), seed=seed)
    return T5(T5Config(head_size=4, **sizes), seed=seed)


@pytest.mark.parametrize("kind", ["gpt2", "encoder", "t5"])
@pytest.mark.parametrize("others", [(1, 2), (0, 1 << 32), (7, 7 + (1 << 40))])
def test_every_seed_draws_other_weights(kind: str, others: tuple[int, int]) -> None:
    """Generators of torch read 32 bits of a seed: what differs above them must count too."""
    first, second = (dict(build(kind, seed).named_parameters()) for seed in others)
    drawn = [
        name for name, parameter in first.items() if parameter.std() > 0 and parameter.ndim > 1
    ]
    assert drawn
    for name in drawn:
        assert not torch.equal(first[name], second[name]), name
    again = dict(build(kind, others[0]).named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in first.items())


def test_equal_shapes_draw_other_weights() -> None:
    attention = build("encoder", 0).blocks[0].attention
    assert not torch.equal(attention.query.weight, attention.key.weight)


def test_seeds_are_spread_over_the_low_bits() -> None:
    seeds = {start_seed(seed, "w") & 0xFFFFFFFF for seed in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= start_seed(seed, "w") < 1 << 63 for seed in (0, 1, 2**63 - 1))


def test_start_weights_stay_what_they_are() -> None:
    """A change here changes every run that starts anew: it must be meant."""
    weights = build("gpt2", 1).state_dict()["token_embedding.weight"].numpy().tobytes()
    assert xxhash.xxh3_64_hexdigest(weights) == "3a7817737daaba32"
