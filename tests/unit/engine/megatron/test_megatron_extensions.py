"""Which parts of transformer-engine and apex are taken, and when."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from mpotrain.engine.megatron import extensions

WRAPPERS = "megatron.core.extensions.transformer_engine"
Install = Callable[..., type[Any]]


class Blocked(ModuleType):
    """A module that cannot be used: as absent, or as one whose library does not load."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self._error = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._error


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a module with a class into the interpreter; nothing real is there, and CUDA is."""
    for name in ("transformer_engine", "apex"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def install(module: str, name: str) -> type[Any]:
        for end in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:end])
            if part.startswith("megatron") and part != module:
                continue
            if not isinstance(sys.modules.get(part), ModuleType) or part == module:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
        found = type(name, (), {})
        setattr(sys.modules[module], name, found)
        return found

    return install


CASES = [
    (extensions.core_attention_class, "TEDotProductAttention"),
    (extensions.norm_class, "TENorm"),
]


@pytest.mark.parametrize(("choose", "name"), CASES)
def test_wrappers(
    choose: Callable[[Any], Any], name: str, stand_in: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = stand_in(WRAPPERS, name)
    assert choose("auto") is None  # megatron-core has a wrapper around nothing
    stand_in("transformer_engine.pytorch", "DotProductAttention")
    assert choose("auto") is wrapper
    assert choose("off") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto") is None


def test_fused_adam(stand_in: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extensions.fused_adam_class("auto") is None
    of_apex = stand_in("apex.optimizers", "FusedAdam")
    assert extensions.fused_adam_class("auto") is of_apex
    of_transformer_engine = stand_in("transformer_engine.pytorch.optimizers", "FusedAdam")
    assert extensions.fused_adam_class("auto") is of_transformer_engine
    assert extensions.fused_adam_class("off") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extensions.fused_adam_class("auto") is None


@pytest.mark.parametrize(
    "error", [ImportError("libcudart"), OSError("undefined symbol"), RuntimeError("driver")]
)
def test_a_package_that_does_not_load_is_as_none(
    error: Exception, stand_in: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_apex = stand_in("apex.optimizers", "FusedAdam")
    stand_in("transformer_engine.pytorch.optimizers", "FusedAdam")
    name = "transformer_engine.pytorch.optimizers"
    monkeypatch.setitem(sys.modules, name, Blocked(name, error))
    assert extensions.fused_adam_class("auto") is of_apex


def test_an_older_package_without_the_class_is_passed_over(stand_in: Install) -> None:
    stand_in("transformer_engine.pytorch.optimizers", "SomethingElse")
    of_apex = stand_in("apex.optimizers", "FusedAdam")
    assert extensions.fused_adam_class("auto") is of_apex


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real packages may be there")
def test_nothing_is_taken_without_cuda() -> None:
    for choose in (
        extensions.core_attention_class,
        extensions.norm_class,
        extensions.fused_adam_class,
    ):
        assert choose("auto") is None
