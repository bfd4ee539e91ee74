"""A small network with every kind of parameter that engines must treat right, and its batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.batch import Batch, LossOutput
from mpotrain.nn.roles import Role, set_role

VOCABULARY = 40
WIDTH = 16
LENGTH = 6
LR = 3e-2


class CoreLinear(nn.Module):
    """Three cores; the central one is owned by the parent and comes as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.left = set_role(nn.Parameter(torch.randn(1, 4, 2, 3) * 0.5), Role.AUXILIARY)
        self.right = set_role(nn.Parameter(torch.randn(5, 2, 4, 1) * 0.5), Role.AUXILIARY)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor, central: Tensor) -> Tensor:
        cores = (self.left.float(), central.float(), self.right.float())
        weight = torch.einsum("aipb,bjqc,ckrd->ijkpqr", *cores).reshape(WIDTH, WIDTH)
        return x @ weight.to(x.dtype) + self.bias.to(x.dtype)


class ToyModel(nn.Module):
    """Embedding, positions of its own, two layers that share a central tensor, a tied head."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        super().__init__()
        self.dtype, self.dropout = dtype, dropout
        self.poisoned_sample = -1
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.central = set_role(nn.Parameter(torch.randn(3, 2, 2, 5) * 0.4), Role.CENTRAL)
        self.layers = nn.ModuleList(CoreLinear() for _ in range(2))
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, batch: Batch) -> LossOutput:
        x = self.embedding(batch.inputs).to(self.dtype) + self.position.to(self.dtype)
        for layer in self.layers:
            x = x + functional.gelu(layer(x, self.central))
            x = functional.dropout(x, self.dropout, self.training)
        x = x + self._dense(x)
        if self.poisoned_sample in batch.sample_ids.tolist():
            x.register_hook(lambda gradient: gradient * float("nan"))
        weight, bias = self.norm.weight.float(), self.norm.bias.float()
        x = functional.layer_norm(x.float(), (WIDTH,), weight, bias).to(self.dtype)
        logits = functional.linear(x, self.embedding.weight.to(self.dtype)).float()
        logits = logits * self.temperature.float()
        targets = batch.targets.masked_fill(~batch.loss_mask, -100)
        loss = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        return LossOutput(loss_sum=loss, num_tokens=batch.loss_mask.sum())

    def _dense(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense.weight.to(x.dtype), self.dense.bias.to(x.dtype))


def build(*, dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 0) -> ToyModel:
    torch.manual_seed(seed)
    return ToyModel(dtype=dtype, dropout=dropout)


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Three groups with a learning-rate factor and a decay of their own."""
    groups: dict[str, list[nn.Parameter]] = {"cores": [], "matrices": [], "vectors": []}
    for parameter in model.parameters():
        kind = "cores" if parameter.ndim == 4 else "matrices" if parameter.ndim == 2 else "vectors"
        groups[kind].append(parameter)
    settings = {"cores": (0.5, 0.05), "matrices": (1.0, 0.1), "vectors": (2.0, 0.0)}
    return torch.optim.AdamW(
        [
            {"name": n, "params": p, "lr_factor": settings[n][0], "weight_decay": settings[n][1]}
            for n, p in groups.items()
        ],
        lr=1.0,
        betas=(0.9, 0.95),
    )


def sample(index: int) -> tuple[Tensor, Tensor]:
    """Sequence number `index` and its mask: sequences count different numbers of targets."""
    generator = torch.Generator().manual_seed(7_000 + index)
    tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
    mask = torch.arange(LENGTH) < 1 + (index * 5) % LENGTH
    return tokens, mask


def batch_of(indices: range) -> Batch:
    pairs = [sample(index) for index in indices]
    tokens = torch.stack([tokens for tokens, _ in pairs])
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=torch.stack([mask for _, mask in pairs]),
        sample_ids=torch.tensor(list(indices)),
    )


def microbatches(
    step: int, *, rank: int, world: int, global_batch: int = 16, micro: int = 2
) -> list[Batch]:
    """This rank's micro-batches of a step, in the layout that all engines share."""
    first = step * global_batch
    per_rank = global_batch // micro // world
    return [
        batch_of(range(first + m * micro, first + (m + 1) * micro))
        for m in (slot * world + rank for slot in range(per_rank))
    ]
