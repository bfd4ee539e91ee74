"""The traffic that `plan` foretells, against the collectives that DeepSpeed really calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from mpotrain.batch import Batch
from mpotrain.engine.config import DeepSpeedConfig
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.engine.memory import step_traffic
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.nn.config import TTMSite
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig
from mpotrain.train.optim import build_optimizer

MODEL = GPT2Config(
    vocab_size=64, context_length=16, hidden_size=32, num_layers=2, num_heads=2, ffn_size=128,
    sites=GPT2Sites(c_fc=TTMSite(rank=8)),
)  # fmt: skip
ACCUMULATION = 2


RINGS = {
    "all_reduce": 2,
    "reduce_scatter_tensor": 1,
    "all_gather_into_tensor": 1,
    "all_gather": 1,
}
"""How often a rank sends its share of the whole buffer in a ring."""


def _whole_buffer(values: Iterable[Any]) -> int:
    """Return the bytes of the largest tensor (or list of tensors) of a call."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    tensors = [[item for item in items if isinstance(item, torch.Tensor)] for items in lists]
    return max(sum(t.numel() * t.element_size() for t in items) for items in tensors)


def count_a_step(world: World, config: DeepSpeedConfig) -> dict[str, float]:
    """Return the bytes that this rank sends in the second step, by kind of collective."""
    import deepspeed

    model = GPT2(MODEL, seed=0)
    engine = DeepSpeedEngine(
        model,
        build_optimizer(model, AdamWConfig()),
        config=config,
        world=world, seed=0, clip_norm=1.0, micro_batch_size=1, accumulation=ACCUMULATION,
        global_batch_size=2 * ACCUMULATION,
    )  # fmt: skip
    tokens = torch.randint(64, (1, 17), generator=torch.Generator().manual_seed(world.rank))
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], torch.ones(1, 16, dtype=torch.bool), torch.zeros(1)
    )
    sent: Counter[str] = Counter()
    # DeepSpeed's back end holds the functions of torch.distributed from its start on.
    backend = deepspeed.comm.comm.cdb
    originals = {name: getattr(backend, name) for name in RINGS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            sent[name] += RINGS[name] * 0.5 * _whole_buffer([*arguments, *named.values()])
            return originals[name](*arguments, **named)

        return call

    try:
        engine.step([batch] * ACCUMULATION, lr=1e-3, step=0)
        for name in RINGS:
            setattr(backend, name, counted(name))
        engine.step([batch] * ACCUMULATION, lr=1e-3, step=1)
    finally:
        for name, original in originals.items():
            setattr(backend, name, original)
        engine.close()
    return dict(sent)


@pytest.mark.parametrize(
    "config",
    [
        DeepSpeedConfig(zero_stage=1),
        DeepSpeedConfig(zero_stage=2),
        DeepSpeedConfig(zero_stage=3, persistence_threshold=0),
        DeepSpeedConfig(zero_stage=3, persistence_threshold=0, max_live_elements=0),
        DeepSpeedConfig(zero_stage=3),
    ],
    ids=["zero-1", "zero-2", "zero-3", "zero-3-nothing-kept", "zero-3-small-stay-whole"],
)
def test_foretold_traffic_is_what_is_sent(
    config: DeepSpeedConfig, run_ranks: Callable[[int], Callable[..., list[Any]]]
) -> None:
    sent = run_ranks(2)(count_a_step, config)[0]
    sizes = [parameter.size for parameter in MODEL.parameters()]
    foretold = step_traffic(config, sizes, 2, ACCUMULATION)
    # Norms, token counts and alignment add a little.
    reduced = sent.get("all_reduce", 0) + sent.get("reduce_scatter_tensor", 0)
    gathered = sent.get("all_gather_into_tensor", 0) + sent.get("all_gather", 0)
    assert reduced == pytest.approx(foretold.gradients, rel=0.05), sent
    assert gathered == pytest.approx(foretold.weights, rel=0.05), sent
