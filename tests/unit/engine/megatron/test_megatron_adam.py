"""Which optimizer updates a rank's parameters, and where it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed.megatron_stand_ins import FusedAdam
from torch import nn

from mpotrain.engine.megatron import adam
from mpotrain.train.lamb import Lamb


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(extensions: str) -> type[Any] | None:
        return FusedAdam if extensions == "auto" else None

    monkeypatch.setattr(adam, "fused_adam_class", choose)


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{**group} for group in optimizer.param_groups]


def reference(**given: Any) -> torch.optim.AdamW:
    marks = {"lr_factor": 0.5, "central": ["a"], "weight_decay": 0.2, "name": "central:a"}
    groups = [{"params": [nn.Parameter(torch.ones(3))], **marks}]
    return torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.7), eps=1e-3, **given)


@pytest.mark.usefixtures("fused")
def test_marks_and_settings_of_groups_are_kept_and_switches_dropped() -> None:
    model = reference(foreach=False)
    built = adam.build_inner(model, groups_of(model), "auto")
    assert type(built) is FusedAdam
    [group] = built.param_groups
    [own] = model.param_groups
    for key in ("lr", "betas", "eps", "weight_decay", "lr_factor", "central", "name", "params"):
        assert group[key] is own[key] or group[key] == own[key]
    assert group["bias_correction"] is True
    assert not {"foreach", "fused", "capturable", "amsgrad"} & group.keys()
    assert adam.counts_in_groups(built)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("given", "setting"), [({}, "off"), ({"amsgrad": True}, "auto"), ({"maximize": True}, "auto")]
)
def test_the_class_of_the_whole_network_stays(given: dict[str, Any], setting: Any) -> None:
    model = reference(**given)
    built = adam.build_inner(model, groups_of(model), setting)
    assert type(built) is torch.optim.AdamW
    assert not adam.counts_in_groups(built)


@pytest.mark.usefixtures("fused")
def test_lamb_is_not_replaced() -> None:
    whole = Lamb([{"params": [nn.Parameter(torch.ones(3))]}], lr=0.1)
    built = adam.build_inner(whole, groups_of(whole), "auto")
    assert type(built) is Lamb
    assert not adam.counts_in_groups(built)


def test_states_begin_as_each_kind_counts() -> None:
    plain = reference()
    fused = FusedAdam(groups_of(plain))
    [parameter] = plain.param_groups[0]["params"]
    adam.begin_groups(plain, 5, lambda group: 4)
    adam.begin_groups(fused, 5, lambda group: 4)
    assert "step" not in plain.param_groups[0]
    assert fused.param_groups[0]["step"] == 4
    adam.begin_groups(fused, 0, lambda group: 4)
    assert fused.param_groups[0]["step"] == 0
    state = adam.begin_state(plain, plain.param_groups[0], parameter, 4)
    assert float(state.pop("step")) == 4
    assert state.keys() == adam.begin_state(fused, fused.param_groups[0], parameter, 4).keys()
