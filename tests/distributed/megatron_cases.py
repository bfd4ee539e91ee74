"""Tiny networks of every kind, and engines over them in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mpotrain.batch import NO_PAIR, Batch
from mpotrain.engine.base import Engine
from mpotrain.engine.config import NO_MASK, CentralMaskConfig, LocalConfig
from mpotrain.engine.local import LocalEngine
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config
from mpotrain.nn.config import MPOSite
from mpotrain.nn.moe.config import MoEConfig, MPOExpertSite, RouterConfig
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig, LambConfig
from mpotrain.train.optim import build_optimizer

CPU_WORLD = World(0, 1, 0, torch.device("cpu"))
GLOBAL, MICRO, SEED, CLIP, LR = 8, 2, 11, 0.7, 1e-3
VOCABULARY, LENGTH = 53, 16

WIDE = MPOSite(in_modes=(4, 2, 2), out_modes=(4, 4, 2), bonds=(5, 3))
NARROW = MPOSite(in_modes=(4, 4, 2), out_modes=(2, 4, 2), bonds=(4, 3))
GPT_TTM = GPT2Config(
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    ffn_size=32,
    dropout=0.0,
    attention_dropout=0.0,
    sites=GPT2Sites(
        qkv=MPOSite(in_modes=(4, 2, 2), out_modes=(12, 2, 2), bonds=(5, 3)),
        attention_out=MPOSite(in_modes=(4, 2, 2), out_modes=(4, 2, 2), bonds=(5, 3)),
        c_fc=WIDE,
        c_proj=NARROW,
    ),
)
"""The modes of the feed-forward layer meet in the central core."""
EXPERTS = MoEConfig(
    num_experts=4,
    router=RouterConfig(top_k=2, balance_loss=0.02, z_loss=0.001, balance_rate=0.001),
    c_fc=MPOExpertSite(in_modes=(2, 2, 2, 2, 1), out_modes=(2, 2, 2, 2, 2)),
    c_proj=MPOExpertSite(in_modes=(2, 2, 2, 2, 2), out_modes=(2, 2, 2, 2, 1)),
)
GPT_MOE = replace(GPT_TTM, num_layers=4, moe=replace(EXPERTS, every=2))
SQUARE = MPOSite(in_modes=(4, 2, 2), out_modes=(4, 2, 2))
MPOBERT = EncoderConfig(
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    ffn_size=32,
    embedding_size=8,
    dropout=0.0,
    attention_dropout=0.0,
    sites=EncoderSites(
        query=SQUARE,
        # The gradient of a key bias is zero but for rounding, which Adam blows up.
        key=replace(SQUARE, bias=False),
        value=SQUARE,
        attention_out=SQUARE,
        c_fc=WIDE,
        c_proj=NARROW,
    ),
    sharing=SharingConfig(scope="central"),
    adapter=AdapterConfig(rank=2),
)
T5_MOE = T5Config(
    vocab_size=VOCABULARY,
    hidden_size=16,
    head_size=4,
    num_layers=2,
    num_heads=4,
    ffn_size=32,
    relative_buckets=8,
    relative_distance=12,
    dropout=0.0,
    moe=EXPERTS,
)
NETWORKS: dict[str, AnyModel] = {
    "gpt-ttm": GPT_TTM,
    "gpt-moe": GPT_MOE,
    "mpobert": MPOBERT,
    "t5-moe": T5_MOE,
}


ADAMW = AdamWConfig(weight_decay=0.1)
ONE = ParallelConfig()
SP = ParallelConfig(tensor=2, sequence=True)
PLAIN = MegatronConfig(device="cpu", distributed_optimizer=False)
SPLIT = MegatronConfig(device="cpu")
OVERLAP = MegatronConfig(
    device="cpu", overlap_grad_reduce=True, overlap_param_gather=True, bucket_elements=500
)


@dataclass(frozen=True)
class Layout:
    """How an engine is set up, beside its network."""

    parallel: ParallelConfig = ONE
    engine: MegatronConfig = SPLIT
    recompute: bool = False
    mask: CentralMaskConfig = NO_MASK
    optimizer: AdamWConfig | LambConfig = ADAMW

    @property
    def ranks(self) -> int:
        parallel = self.parallel
        dense = parallel.model_ranks * (parallel.data or 1)
        return max(dense, parallel.expert * parallel.expert_tensor * parallel.pipeline)


def network(name: str, *, recompute: bool = False) -> AnyModel:
    return replace(NETWORKS[name], activation_checkpointing=recompute)


def build(model: AnyModel, seed: int = 3) -> torch.nn.Module:
    if isinstance(model, EncoderConfig):
        return Encoder(model, seed=seed)
    if isinstance(model, T5Config):
        return T5(model, seed=seed)
    return GPT2(model, seed=seed)


def local_engine(
    model: AnyModel,
    *,
    mask: CentralMaskConfig = NO_MASK,
    optimizer: AdamWConfig | LambConfig = ADAMW,
) -> LocalEngine:
    built = build(model)
    return LocalEngine(
        built,
        build_optimizer(built, optimizer, mask, device=CPU_WORLD.device),
        config=LocalConfig(device="cpu"),
        world=CPU_WORLD,
        seed=SEED,
        clip_norm=CLIP,
        central_mask=mask,
    )


def megatron_engine(world: World, model: AnyModel, layout: Layout) -> Engine:
    from mpotrain.engine.megatron import cpu

    cpu.install()
    try:
        from mpotrain.engine.megatron.engine import MegatronEngine
    finally:
        cpu.uninstall()
    built = build(model)
    return MegatronEngine(
        built,
        build_optimizer(built, layout.optimizer, layout.mask, device=world.device),
        network=model,
        config=layout.engine,
        world=replace(world, parallel=layout.parallel),
        seed=SEED,
        clip_norm=CLIP,
        central_mask=layout.mask,
    )


def microbatches(model: AnyModel, step: int, rank: int = 0, size: int = 1) -> list[Batch]:
    """This data-parallel rank's micro-batches of a global batch."""
    return [one_batch(model, step, number) for number in range(rank, GLOBAL // MICRO, size)]


def one_batch(model: AnyModel, step: int, number: int, rows: int = MICRO) -> Batch:
    draw = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(1, VOCABULARY, (rows, LENGTH + 1), generator=draw)
    if isinstance(model, EncoderConfig):
        mask = torch.rand(rows, LENGTH, generator=draw) < 0.3
        mask[:, 2] = True
        labels = torch.full((rows, LENGTH), NO_PAIR)
        labels[:, 0] = torch.randint(0, 2, (rows,), generator=draw)
        inputs = ids[:, :-1].clone()
        inputs[mask] = 0
        types = (torch.arange(LENGTH) > LENGTH // 2).long().expand(rows, -1)
        documents = torch.ones(rows, LENGTH, dtype=torch.int64)
        documents[:, 12:] = 2
        return Batch(
            inputs, ids[:, :-1], mask, torch.arange(rows),
            document_ids=documents, token_types=types.contiguous(), pair_labels=labels,
        )  # fmt: skip
    counts = torch.rand(rows, LENGTH, generator=draw) < 0.9
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), counts, torch.arange(rows))
    if isinstance(model, T5Config):
        source = torch.randint(1, VOCABULARY, (rows, LENGTH + 4), generator=draw)
        batch = replace(batch, encoder_inputs=source)
    return batch


def run_steps(engine: Engine, model: AnyModel, steps: Sequence[int]) -> list[tuple[float, ...]]:
    """Loss, gradient norm and gradient norm of each role, step by step.

    The norm of all gradients hardly feels those of a small role: a central tensor whose gradient
    is wrong by half may change it by 1e-6.
    """
    world = engine.world
    found = []
    for step in steps:
        batches = microbatches(model, step, world.data_rank, world.data_size)
        result = engine.step(batches, lr=LR * (1 + step) / 4, step=step, detail=True)
        assert not result.skipped, result.reason
        roles = result.grad_norm_by_role or {}
        found.append((result.loss, result.grad_norm, *(roles[role] for role in sorted(roles))))
    return found
