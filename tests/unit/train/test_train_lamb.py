"""LAMB against the rule of the paper, written out in float64, and what it takes from its groups."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from mpotrain.engine.config import CentralMaskConfig, LocalConfig
from mpotrain.engine.fragment import Fragment
from mpotrain.engine.layerwise import LayerMap, Layerwise, Piece, map_layers
from mpotrain.engine.local import LocalEngine
from mpotrain.errors import ParallelError
from mpotrain.nn.roles import Role, set_experts, set_role
from mpotrain.parallel.ranks import World
from mpotrain.train.config import AdamWConfig, LambConfig, TrainConfig
from mpotrain.train.lamb import Lamb
from mpotrain.train.optim import build_optimizer

WORLD = World(0, 1, 0, torch.device("cpu"))
SHAPES = [(7, 5), (3, 2, 2, 5), (11,), (1,), (40, 16)]


def paper(
    w: list[float],
    gradients: list[list[float]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    bounds: tuple[float, float] = (0.0, math.inf),
    adapt: bool = True,
) -> list[float]:
    """Algorithm 2 of You et al. (2020), number by number."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(gradients, start=1):
        m = [betas[0] * a + (1 - betas[0]) * b for a, b in zip(m, g, strict=True)]
        v = [betas[1] * a + (1 - betas[1]) * b * b for a, b in zip(v, g, strict=True)]
        u = [
            (a / (1 - betas[0] ** t)) / (math.sqrt(b / (1 - betas[1] ** t)) + eps) + decay * x
            for a, b, x in zip(m, v, w, strict=True)
        ]
        w_norm, u_norm = math.hypot(*w), math.hypot(*u)
        trust = 1.0
        if adapt and w_norm > 0 and u_norm > 0:
            trust = min(max(w_norm / u_norm, bounds[0]), bounds[1])
        w = [x - lr * trust * y for x, y in zip(w, u, strict=True)]
    return w


def train(
    shapes: list[tuple[int, ...]], groups: list[dict[str, Any]], **options: Any
) -> list[tuple[Tensor, list[Tensor], Tensor]]:
    """Five steps; return start, gradients and end of every tensor."""
    generator = torch.Generator().manual_seed(3)
    tensors = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * (0.1 + n))
        for n, shape in enumerate(shapes)
    ]
    starts = [tensor.detach().clone() for tensor in tensors]
    parts: list[list[nn.Parameter]] = [tensors[n :: len(groups)] for n in range(len(groups))]
    optimizer = Lamb(
        [{"params": part, **group} for part, group in zip(parts, groups, strict=True)],
        lr=0.1,
        **options,
    )
    gradients: list[list[Tensor]] = [[] for _ in tensors]
    for step in range(5):
        for tensor, history in zip(tensors, gradients, strict=True):
            history.append(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
            tensor.grad = history[-1] * (1 + step)
            history[-1] = tensor.grad.clone()
        optimizer.step()
    return [
        (start, history, tensor.detach())
        for start, history, tensor in zip(starts, gradients, tensors, strict=True)
    ]


GROUPS: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "lr": 0.02},
    {"weight_decay": 0.0, "lr": 0.3},
    {"weight_decay": 0.5, "adapt": False},
]


@pytest.mark.parametrize("bounds", [(None, None), (0.01, 0.3), (2.0, None), (None, 0.05)])
def test_five_steps_follow_the_paper(bounds: tuple[float | None, float | None]) -> None:
    low, high = bounds
    options: dict[str, Any] = {"betas": (0.8, 0.97), "eps": 1e-3}
    outcome = train(SHAPES, GROUPS, min_trust=low, max_trust=high, **options)
    for number, (start, gradients, end) in enumerate(outcome):
        group = GROUPS[number % len(GROUPS)]
        wanted = paper(
            start.flatten().tolist(),
            [g.flatten().tolist() for g in gradients],
            lr=group.get("lr", 0.1),
            decay=group["weight_decay"],
            bounds=(0.0 if low is None else low, math.inf if high is None else high),
            adapt=group.get("adapt", True),
            **options,
        )
        torch.testing.assert_close(end.flatten().tolist(), wanted, rtol=1e-12, atol=1e-13)


def test_bounds_decide_something() -> None:
    free = train(SHAPES, GROUPS)
    for bounds in ({"min_trust": 2.0}, {"max_trust": 0.05}):
        held = train(SHAPES, GROUPS, **bounds)
        assert not torch.equal(free[0][2], held[0][2])
        assert torch.equal(free[2][2], held[2][2])  # trust 1 is not held between bounds


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0)])
def test_trust_is_one_where_a_norm_is_zero(weight: float, gradient: float) -> None:
    tensor = nn.Parameter(torch.full((4,), weight, dtype=torch.float64))
    optimizer = Lamb([tensor], lr=0.1, weight_decay=0.0, eps=1e-30, max_trust=0.5)
    tensor.grad = torch.full((4,), gradient, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(tensor.tolist(), [weight - 0.1 * gradient] * 4)


def test_without_trust_it_is_adam_and_moments_are_those_of_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    ours, adam = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    lamb = Lamb([{"params": [ours], "adapt": False}], **options)
    adamw = torch.optim.AdamW([adam], foreach=False, **options)
    for _ in range(4):
        gradient = torch.randn(6, 4, generator=generator)
        ours.grad, adam.grad = gradient.clone(), gradient.clone()
        lamb.step()
        adamw.step()
    torch.testing.assert_close(ours, adam, rtol=1e-6, atol=1e-7)
    assert lamb.state[ours].keys() == adamw.state[adam].keys()
    for kind, value in adamw.state[adam].items():
        assert torch.equal(lamb.state[ours][kind], value)
        assert lamb.state[ours][kind].dtype == value.dtype


def test_closures_and_missing_gradients() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Lamb([used, unused], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 3.0
    assert float(used.detach()[0]) < 1.0
    assert torch.equal(unused, torch.ones(3))
    assert unused not in optimizer.state


class Mixture(nn.Module):
    """A matrix, a core, a vector, and tensors with a row for each of three experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        scales = torch.tensor([0.1, 1.0, 10.0])
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.core = set_role(nn.Parameter(torch.randn(2, 2, 2, 3)), Role.CENTRAL)
        self.bias = nn.Parameter(torch.randn(4))
        self.experts = set_experts(
            set_role(nn.Parameter(torch.randn(3, 4, 4) * scales[:, None, None]), Role.EXPERT), 3
        )
        self.expert_bias = set_experts(set_role(nn.Parameter(torch.randn(3, 4)), Role.EXPERT), 3)


def test_groups_say_what_is_adapted() -> None:
    config = LambConfig(weight_decay=0.1, core_lr_factor=0.5, core_weight_decay=0.2, min_trust=0.01)
    mask = CentralMaskConfig(probability=0.5)
    found = {
        group["name"]: (group["adapt"], group["weight_decay"], group["lr_factor"])
        for group in build_optimizer(Mixture(), config, mask).param_groups
    }
    assert found == {
        "dense": (True, 0.1, 1.0),
        "dense_no_decay": (False, 0.0, 1.0),
        "central": (True, 0.2, 0.5),
        "expert_dense": (True, 0.1, 1.0),
        "expert_dense_no_decay": (False, 0.0, 1.0),
    }
    every = build_optimizer(Mixture(), LambConfig(adapt_vectors=True))
    assert all(group["adapt"] for group in every.param_groups)
    bounds = [
        (g["min_trust"], g["max_trust"]) for g in build_optimizer(Mixture(), config).param_groups
    ]
    assert set(bounds) == {(0.01, None)}
    assert isinstance(every, Layerwise)
    adamw = build_optimizer(Mixture(), AdamWConfig())
    assert not isinstance(adamw, Layerwise)
    assert not any("adapt" in group for group in adamw.param_groups)


def test_every_expert_is_a_layer_of_its_own() -> None:
    model = Mixture()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, LambConfig(adapt_vectors=True))
    LocalEngine(
        model, optimizer, config=LocalConfig(device="cpu"), world=WORLD, seed=0, clip_norm=None
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rows = (before[name], parameter.detach())
        if not name.startswith("expert"):
            rows = (rows[0][None], rows[1][None])
        for old, new in zip(*rows, strict=True):
            moved = float((new - old).norm() / old.norm())
            assert moved == pytest.approx(0.1, rel=1e-5), name


def test_pieces_of_experts_that_a_flat_vector_cuts() -> None:
    """Elements 5..13 of three experts with 6 each lie at 2..10 of a vector of 12."""
    experts = set_experts(nn.Parameter(torch.zeros(3, 6)), 3)
    flat = torch.arange(12, dtype=torch.float32)
    head = nn.Parameter(torch.zeros(2))
    fragments = {"head": Fragment(0, 2, flat, 0), "experts": Fragment(5, 9, flat, 2)}
    sizes = {"head": (2,), "experts": (3, 6)}
    with pytest.raises(ParallelError, match=r"^experts: the ranks together do not hold"):
        map_layers(
            [flat], {"head": head, "experts": experts}, sizes, fragments.__getitem__, WORLD,
            shared=False,
        )  # fmt: skip

    class Other(World):
        """Two ranks; the other one has everything that is missing here."""

        def gather_objects(self, value: Any) -> list[Any]:
            return [value, [[(1, 5), (3, 4)]]]

        def all_reduce_sum(self, tensor: Tensor) -> Tensor:
            return tensor + torch.tensor([0.0, 100.0, 0.0, 1000.0], dtype=tensor.dtype)

    layers = map_layers(
        [flat],
        {"head": head, "experts": experts},
        sizes,
        fragments.__getitem__,
        Other(0, 2, 0, torch.device("cpu")),
        shared=False,
    )
    wanted = [0 + 1, 2**2 + 100, sum(n * n for n in range(3, 9)), 9**2 + 10**2 + 1000]
    (sums,) = layers.squares(flat, [flat])
    torch.testing.assert_close(sums, torch.tensor(wanted, dtype=torch.float64))
    vector = torch.ones(12)
    layers.scale_(flat, vector, torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64))
    assert vector.tolist() == [2.0, 2.0, 3.0, *[5.0] * 6, 7.0, 7.0, 1.0]


def test_a_rank_without_pieces_adds_zeros_and_gets_the_sums() -> None:
    flat = torch.ones(3)
    layers = LayerMap([(flat, 2, [])], lambda sums: sums + 4.0)
    assert layers.squares(flat, [flat, flat]).tolist() == [[4.0, 4.0], [4.0, 4.0]]
    layers.scale_(flat, flat, torch.full((2,), 9.0))
    assert flat.tolist() == [1.0, 1.0, 1.0]
    assert Piece(0, 1, 2).of(torch.arange(4.0).view(2, 2)).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"betas": (0.9, 1.0)}, "t.optimizer.betas: each must be in [0, 1), is 1.0"),
        ({"eps": 0.0}, "t.optimizer.eps: must be positive, is 0.0"),
        ({"weight_decay": -1.0}, "t.optimizer.weight_decay: must not be negative, is -1.0"),
        ({"core_lr_factor": 0.0}, "t.optimizer.core_lr_factor: must be positive, is 0.0 (1.0"),
        ({"min_trust": -0.1}, "t.optimizer.min_trust: must not be negative, is -0.1"),
        ({"max_trust": 0.0}, "t.optimizer.max_trust: must be positive, is 0.0 (leave"),
        (
            {"min_trust": 0.5, "max_trust": 0.3},
            "t.optimizer.min_trust: 0.5 is larger than max_trust 0.3",
        ),
    ],
)
def test_impossible_values_are_named(settings: dict[str, Any], line: str) -> None:
    (found,) = LambConfig(**settings).problems("t.optimizer")
    assert found.startswith(line)


def read(**sections: Any) -> TrainConfig:
    text = json.dumps(
        {
            "steps": 4,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "schedule": {"kind": "constant", "lr": 0.1},
            **sections,
        }
    )
    return TypeAdapter(TrainConfig).validate_json(text)


def test_the_section_is_chosen_by_its_kind() -> None:
    train = read(optimizer={"kind": "lamb", "max_trust": 0.3})
    assert train.optimizer == LambConfig(max_trust=0.3)
    assert train.problems("train") == []
    assert read().optimizer == AdamWConfig()
    bad = read(optimizer={"kind": "lamb", "eps": -1.0})
    assert bad.problems("train") == ["train.optimizer.eps: must be positive, is -1.0"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_host() -> None:
    ends = []
    for device in ("cpu", "cuda"):
        model = Mixture()
        optimizer = build_optimizer(model, LambConfig(adapt_vectors=True, max_trust=5.0))
        LocalEngine(
            model,
            optimizer,
            config=LocalConfig(device=device),
            world=World(0, 1, 0, torch.device(device)),
            seed=0,
            clip_norm=None,
        )
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        ends.append([parameter.detach().cpu() for parameter in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
