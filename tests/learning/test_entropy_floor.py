"""A source with known entropy rate: the whole path from text to loss, held against mathematics.

A trained model must come close to the entropy rate H from above. A loss below H means that the
model has seen what it should predict; far above, that labels, order or learning are broken.
"""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mpotrain.config import load_config
from mpotrain.data.config import PrepareConfig
from mpotrain.data.prepare import prepare
from mpotrain.pretrain import train
from mpotrain.train.journal import read_metrics

BASE = Path(__file__).resolve().parents[2] / "configs" / "base" / "gpt2-tiny.toml"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Prepared tokens of an order-2 Markov chain, and its entropy rate in nats per token."""
    folder = tmp_path_factory.mktemp("markov") / "data"
    config = PrepareConfig(
        sources=("synthetic:markov",), out=str(folder), num_tokens=600_000, num_workers=0
    )
    return folder, float(prepare(config).extra["entropy_rate"])


def final_loss(data: Path, folder: Path, steps: int) -> float:
    """Train a small TTM GPT-2 and return its validation loss in nats per token."""
    run = load_config(
        BASE,
        [
            "name=floor",
            f'folder="{folder.as_posix()}"',
            f'data.sources=[{{path="{data.as_posix()}"}}]',
            "data.sequence_length=32",
            "data.split=[0.9, 0.1, 0.0]",
            "model.vocab_size=16",
            "model.context_length=32",
            "model.sites.c_fc={kind='ttm', rank=16}",
            "model.sites.c_proj={kind='ttm', rank=16}",
            f"train.steps={steps}",
            "train.global_batch_size=64",
            "train.micro_batch_size=64",
            "train.schedule={kind='cosine', lr=6e-3, warmup_steps=20}",
            "train.optimizer.weight_decay=0.01",
            f"train.eval_every={steps}",
            "train.eval_sequences=1000",
            "train.tensorboard=false",
            "checkpoint.every=100000",
        ],
    )
    assert train(run) == 0
    return float(read_metrics(folder, "eval")[-1]["loss"])


def within_floor(loss: float, entropy: float) -> bool:
    """Whether a trained model's loss is where it must be."""
    return 0.98 * entropy <= loss <= 1.06 * entropy


@pytest.mark.slow
def test_a_trained_model_ends_at_the_entropy_rate(
    source: tuple[Path, float], tmp_path: Path
) -> None:
    data, entropy = source
    loss = final_loss(data, tmp_path / "run", 700)
    assert within_floor(loss, entropy), f"loss {loss}, entropy rate {entropy}"


@pytest.mark.slow
def test_a_planted_mask_that_is_not_causal_is_caught(
    source: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = functional.scaled_dot_product_attention

    def leaking(
        *arguments: torch.Tensor, attn_mask: None, is_causal: bool, dropout_p: float
    ) -> torch.Tensor:
        assert is_causal
        return attention(*arguments, dropout_p=dropout_p)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", leaking)
    data, entropy = source
    loss = final_loss(data, tmp_path / "run", 200)
    assert not within_floor(loss, entropy)
    assert loss < 0.5 * entropy
