"""The traffic of mixtures that `plan` foretells, against the collectives that are really called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from distributed.engines import zero
from distributed.mixture_model import GLOBAL, MICRO, engine_of, microbatches, model_config
from distributed.test_traffic import RINGS, _whole_buffer
from distributed.toy_model import LENGTH

from mpotrain.engine.config import DeepSpeedConfig
from mpotrain.engine.expert_traffic import TokenFlow
from mpotrain.engine.memory import ExpertSizes, step_traffic
from mpotrain.parallel.ranks import World

MODEL = model_config()
RECOMPUTED = model_config(activation_checkpointing=True)


def count_a_step(
    world: World, config: DeepSpeedConfig, expert_ranks: int, recompute: bool
) -> dict[str, float]:
    """Return the bytes that this rank sends in the second step, by kind of collective.

    A ring over n ranks sends (n - 1) / n of the whole buffer, all-reduce twice that; of an exchange
    of tokens the rows for other ranks leave.
    """
    import deepspeed

    engine = engine_of(world, config, RECOMPUTED if recompute else MODEL, expert_ranks=expert_ranks)
    sent: Counter[str] = Counter()
    backend = deepspeed.comm.comm.cdb
    originals = {name: getattr(backend, name) for name in RINGS}
    exchange = dist.all_to_all_single

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            groups = [v for v in (*arguments, *named.values()) if isinstance(v, dist.ProcessGroup)]
            ranks = dist.get_world_size(groups[0] if groups else None)
            whole = _whole_buffer([*arguments, *named.values()])
            sent[name] += RINGS[name] * (ranks - 1) / ranks * whole
            return originals[name](*arguments, **named)

        return call

    def count_rows(output: Any, rows: Any, *arguments: Any, **named: Any) -> Any:
        if rows.ndim == 2:
            here = dist.get_rank(named["group"])
            leaving = rows.shape[0] - arguments[1][here]
            sent["exchanges"] += 1
            sent["rows"] += leaving * rows.shape[1] * rows.element_size()
        return exchange(output, rows, *arguments, **named)

    try:
        engine.step(microbatches(0, world), lr=1e-3, step=0)
        for name in RINGS:
            setattr(backend, name, counted(name))
        dist.all_to_all_single = count_rows  # type: ignore[assignment]
        engine.step(microbatches(1, world), lr=1e-3, step=1)
    finally:
        dist.all_to_all_single = exchange
        for name, original in originals.items():
            setattr(backend, name, original)
        engine.close()
    return dict(sent)


@pytest.mark.parametrize(
    ("stage", "world", "expert_ranks", "recompute"),
    [(1, 2, 2, False), (1, 2, 2, True), (2, 2, 2, False), (1, 4, 2, False), (1, 2, 1, False)],
)
def test_foretold_traffic_is_what_is_sent(
    run_ranks: Any, stage: int, world: int, expert_ranks: int, recompute: bool
) -> None:
    config = zero(stage)
    outcomes = run_ranks(world)(count_a_step, config, expert_ranks, recompute)
    parameters = list(MODEL.parameters())
    flow = TokenFlow(
        num_tokens=MICRO * LENGTH,
        top_k=1,
        hidden_size=MODEL.hidden_size,
        width=4,
        num_mixtures=len(MODEL.mixtures()),
        recomputed=recompute,
    )
    experts = ExpertSizes(
        sum(p.size for p in parameters if p.num_experts),
        expert_ranks,
        flow.exchanged(expert_ranks),
    )
    accumulation = GLOBAL // MICRO // world
    foretold = step_traffic(config, [p.size for p in parameters], world, accumulation, experts)
    # What a rank sends depends on where its tokens go: even loads are foretold.
    rows = sum(sent.get("rows", 0.0) for sent in outcomes) / world
    assert rows == pytest.approx(foretold.tokens, rel=0.25)
    sent = outcomes[0]
    exchanges = 0 if expert_ranks == 1 else 6 if recompute else 4
    assert sent.get("exchanges", 0) == exchanges * len(MODEL.mixtures()) * accumulation
    reduced = sent.get("all_reduce", 0) + sent.get("reduce_scatter_tensor", 0)
    gathered = sent.get("all_gather_into_tensor", 0) + sent.get("all_gather", 0)
    assert reduced == pytest.approx(foretold.gradients, rel=0.05), sent
    assert gathered == pytest.approx(foretold.weights, rel=0.05), sent
