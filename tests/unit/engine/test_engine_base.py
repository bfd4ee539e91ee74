from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpotrain.engine.base import EvalResult, skip_reason
from mpotrain.engine.deepspeed_start import extensions_folder, stale_locks, start_deepspeed
from mpotrain.engine.gradients import (
    ROLES,
    check_parameter_groups,
    norms_by_role,
    set_learning_rate,
    squares_by_role,
    total_norm,
)
from mpotrain.engine.state import fresh_adam_state, host_copy, read_checked
from mpotrain.errors import CheckpointError, ConfigError
from mpotrain.nn.roles import Role
from mpotrain.parallel.ranks import World


def test_eval_result() -> None:
    result = EvalResult(loss_sum=6.0, num_tokens=4)
    assert result.mean == 1.5
    assert result.perplexity == pytest.approx(math.exp(1.5))
    assert EvalResult(1e9, 1).perplexity == math.inf
    assert math.isnan(EvalResult(0.0, 0).mean)


@pytest.mark.parametrize(
    ("loss", "norm", "tokens", "reason"),
    [
        (1.0, 2.0, 3, None),
        (math.nan, 2.0, 3, "loss is nan"),
        (-math.inf, 2.0, 3, "loss is -inf"),
        (1.0, math.nan, 3, "gradient norm is nan"),
        (1.0, math.inf, 3, "gradient norm is inf"),
    ],
)
def test_values_that_are_not_finite_never_pass(
    loss: float, norm: float, tokens: int, reason: str | None
) -> None:
    assert skip_reason(loss, norm, tokens, None) == reason
    assert skip_reason(loss, norm, tokens, lambda *_: None) == reason
    assert skip_reason(loss, norm, tokens, lambda *_: "guard first") == "guard first"


def test_a_batch_without_targets_never_reaches_the_guard() -> None:
    # Its loss of zero would enter the guard's window as an accepted step.
    def guard(loss: float, norm: float) -> str | None:
        raise AssertionError((loss, norm))

    reason = "no target of the global batch counts in the loss"
    assert skip_reason(0.0, 0.0, 0, guard) == reason
    assert skip_reason(0.0, 0.0, 0, None) == reason


def test_norm_of_cut_gradients_is_that_of_whole_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    whole = {
        role: torch.randn(37, 11, generator=generator, dtype=torch.float64) for role in ROLES[:3]
    }
    pieces = [
        (role, piece) for role, tensor in whole.items() for piece in tensor.flatten().split(53)
    ]
    squares = squares_by_role(pieces, torch.device("cpu")).tolist()
    wanted = {role: float(tensor.square().sum()) for role, tensor in whole.items()}
    assert total_norm(squares) == pytest.approx(math.sqrt(sum(wanted.values())), rel=1e-6)
    named = norms_by_role(squares, whole)
    assert named == pytest.approx({str(r): math.sqrt(w) for r, w in wanted.items()}, rel=1e-6)
    assert Role.ADAPTER not in named


def test_norm_lets_nan_and_infinity_through() -> None:
    for bad in (math.nan, math.inf):
        gradients = [(Role.DENSE, torch.ones(3)), (Role.CENTRAL, torch.tensor([1.0, bad]))]
        squares = squares_by_role(gradients, torch.device("cpu")).tolist()
        assert squares[ROLES.index(Role.DENSE)] == pytest.approx(3.0)
        assert not math.isfinite(total_norm(squares))


def test_parameter_groups_are_checked_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    first, second = model[0], model[1]
    stray = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW(
        [
            {"params": [first.weight, stray], "lr_factor": 1.0},
            {"params": [second.weight, second.bias], "amsgrad": True},
        ]
    )
    found = check_parameter_groups(model, optimizer)
    assert found == [
        "parameter group 1: no lr_factor; give it one (1.0 = plain lr)",
        "parameter group 1: amsgrad keeps a third moment; turn it off",
        "0.bias: not in the optimizer",
        "a parameter outside the model: in 1 parameter groups",
    ]


def test_learning_rate_of_each_group() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr_factor": factor} for factor in (1.0, 0.25)
    ]
    optimizer = torch.optim.AdamW(groups, lr=5.0)
    set_learning_rate(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]


def test_fresh_adam_state_is_what_adamw_builds() -> None:
    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.zeros(3, 2)
    optimizer.step()
    built = fresh_adam_state(optimizer.param_groups[0], parameter, 1)
    theirs = optimizer.state[parameter]
    assert built.keys() == theirs.keys()
    for key in built:
        assert built[key].dtype == theirs[key].dtype
        assert built[key].device == theirs[key].device
        assert torch.equal(built[key], theirs[key])


def test_state_of_another_model_is_refused_by_name() -> None:
    good = {kind: torch.zeros(2, 3) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    assert read_checked(lambda _: good, "a.b", (2, 3), 5).keys() == good.keys()
    assert read_checked(lambda _: good, "a.b", (2, 3), 0).keys() == {"weight"}
    with pytest.raises(CheckpointError, match=r"a\.b: weight is torch.float32 \(2, 3\).*\(3, 2\)"):
        read_checked(lambda _: good, "a.b", (3, 2), 5)
    with pytest.raises(CheckpointError, match=r"a\.b: exp_avg is missing after 5 updates"):
        read_checked(lambda _: {"weight": torch.zeros(2, 3)}, "a.b", (2, 3), 5)
    with pytest.raises(CheckpointError, match=r"torch\.bfloat16"):
        read_checked(lambda _: {"weight": torch.zeros(1).bfloat16()}, "a", (1,), 0)


def test_host_copy_shares_nothing() -> None:
    tensor = torch.zeros(2)
    copy = host_copy(tensor)
    tensor += 1
    assert copy.tolist() == [0.0, 0.0]


def test_old_locks_are_found_and_young_ones_are_not(tmp_path: Path) -> None:
    assert stale_locks(tmp_path / "absent", 0.0) == []
    for folder in ("py311_cpu/deepspeed_shm_comm", "fused_adam"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "lock").touch()
    born = (tmp_path / "fused_adam/lock").stat().st_mtime
    assert stale_locks(tmp_path, born + 60) == []
    assert stale_locks(tmp_path, born + 6000) == [
        tmp_path / "fused_adam/lock",
        tmp_path / "py311_cpu/deepspeed_shm_comm/lock",
    ]


def test_extensions_folder() -> None:
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    assert extensions_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/torch_extensions")
    assert extensions_folder({}) == Path.home() / ".cache/torch_extensions"


def test_deepspeed_without_a_process_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a process group"):
        start_deepspeed(World(0, 1, 0, torch.device("cpu")))
