"""The shim that lets megatron-core run on the CPU: what it changes, and that it gives all back."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from mpotrain.engine.megatron import cpu

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim rests where CUDA is")


@pytest.fixture
def shim() -> Iterator[None]:
    assert cpu.install()
    try:
        yield
    finally:
        cpu.uninstall()


def touched_modules() -> list[ModuleType]:
    from megatron.core import jit
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    return [
        torch,
        torch.cuda,
        torch.cuda.random,
        jit,
        mappings,
        random,
        moe_utils,
        token_dispatcher,
    ]


def attributes() -> dict[str, Any]:
    """All names of all modules that the shim could touch."""
    return {
        f"{module.__name__}.{name}": value
        for module in touched_modules()
        for name, value in vars(module).items()
    }


def changed(before: dict[str, Any]) -> set[str]:
    after = attributes()
    return {name for name, value in before.items() if after.get(name) is not value}


def modes() -> list[Any]:
    return [
        torch._C._get_function_stack_at(place)
        for place in range(torch._C._len_torch_function_stack())
    ]


def test_all_is_given_back() -> None:
    cpu.install()  # imports what is to be compared
    cpu.uninstall()
    before, stack = attributes(), modes()
    assert cpu.install()
    replaced = changed(before)
    cpu.uninstall()
    assert {"torch.cuda.current_device", "torch.cuda.Stream", "megatron.core.jit.jit_fuser"} <= (
        replaced
    )
    assert not {"torch.compile", "torch.manual_seed", "torch.cuda.manual_seed_all"} & replaced
    assert changed(before) == set()
    assert modes() == stack
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_installing_counts() -> None:
    for _ in range(2):
        assert cpu.install()
    cpu.uninstall()
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    cpu.uninstall()
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    cpu.uninstall()  # one too many does nothing
    assert cpu.install()
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    cpu.uninstall()
    assert torch.cuda.current_device.__module__ == "torch.cuda"


def test_rests_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.install()
    cpu.uninstall()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, stack = attributes(), modes()
    assert not cpu.install()
    assert changed(before) == set()
    assert modes() == stack
    cpu.uninstall()


def test_a_failed_install_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.install()
    cpu.uninstall()
    before, stack = attributes(), modes()

    def broken() -> Any:
        raise ImportError("no such module")

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_megatron_functions", broken)
        with pytest.raises(ImportError):
            cpu.install()
    assert changed(before) == set()
    assert modes() == stack
    assert cpu.install()
    cpu.uninstall()


class Doubled(TorchFunctionMode):
    """A mode of somebody else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ones else result


def test_other_modes_keep_their_places() -> None:
    below, above = Doubled(), Doubled()
    with below:
        assert cpu.install()
        with above:
            assert torch.ones(1, device="cuda").item() == 4
            cpu.uninstall()
            assert modes()[-2:] == [below, above]
            assert torch.ones(1).item() == 4
        assert modes()[-1] is below
    assert not any(isinstance(mode, cpu.CudaMeansCpu) for mode in modes())


def test_a_mode_that_was_taken_away_is_not_missed() -> None:
    outer = Doubled()
    outer.__enter__()
    assert cpu.install()
    outer.__exit__(None, None, None)  # takes the topmost: ours
    cpu.uninstall()
    assert modes()[-1] is outer
    outer.__exit__(None, None, None)


def test_other_threads(shim: None) -> None:
    seen: dict[str, Any] = {}

    def work() -> None:
        cpu.uninstall()  # not this thread's
        try:
            torch.zeros(1, device="cuda")
        except (AssertionError, RuntimeError) as error:
            seen["before"] = error
        cpu.install()
        seen["inside"] = torch.zeros(1, device="cuda").device.type
        cpu.uninstall()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(seen["before"], Exception)
    assert seen["inside"] == "cpu"
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)]
)
def test_devices(shim: None, device: Any) -> None:
    x = torch.arange(3.0)
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1], device=device),
        torch.empty(2, dtype=torch.int, device=torch.cuda.current_device()),
        x.new_zeros(2, device=device),
        torch.empty_like(x, device=device),
        x.to(device),
        x.to(device, torch.bfloat16),
        x.to(device=device, dtype=torch.float64),
        x.cuda(),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).cuda().to(device).weight,
    ]
    assert {value.device.type for value in made} == {"cpu"}
    assert made[6].dtype == torch.bfloat16
    assert made[7].dtype == torch.float64
    assert torch.equal(x.cuda(), x)
    assert x.to("cpu") is x
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_gradients_and_types(shim: None) -> None:
    x = torch.arange(3.0, requires_grad=True)
    (x.cuda() ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 4]
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert not torch.cuda.is_available()


def test_streams_and_events(shim: None) -> None:
    side, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    assert side == torch.cuda.current_stream() == torch.cuda.default_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
    side.record_event(event)
    side.record_event().synchronize()
    side.wait_event(event)
    event.record()
    event.wait(side)
    event.synchronize()
    torch.cuda.synchronize()
    assert event.query()
    assert event.elapsed_time(torch.cuda.Event()) == 0.0
    assert len({side, torch.cuda.current_stream()}) == 1


def test_random_states(shim: None) -> None:
    torch.manual_seed(3)
    first = torch.rand(4)
    state = torch.cuda.get_rng_state()
    second = torch.rand(4)
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), second)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.manual_seed_all(3)  # without a device it does nothing
    assert torch.equal(torch.rand(4), second)


def test_streams_of_random_numbers(shim: None, caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("own", 2)
    default = torch.rand(3)
    with caplog.at_level(logging.WARNING), tracker.fork("own"):
        forked = torch.rand(3)
    after = torch.rand(3)
    with tracker.fork("own"):
        later = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), forked)
    assert torch.equal(torch.rand(3), later)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), default)
    assert torch.equal(torch.rand(3), after)
    assert caplog.records == []


def test_other_warnings_of_random_streams_are_shown(
    shim: None, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("megatron.core.tensor_parallel.random")
    log.warning("something else")
    log.warning("CPU RNG state changed within GPU RNG context")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert log.filters == [cpu._is_no_false_alarm]
    cpu.uninstall()
    assert log.filters == []
    cpu.install()


def test_recomputed_dropout_draws_the_same(shim: None) -> None:
    from megatron.core import tensor_parallel

    x = torch.ones(64, requires_grad=True)

    def drop(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(value, 0.5)

    torch.manual_seed(5)
    y = tensor_parallel.random.CheckpointFunction.apply(drop, False, x)
    torch.rand(7)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert 0 < (x.grad == 0).sum() < 64


def test_split_sizes(shim: None) -> None:
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    sizes = torch.tensor([3, 0, 2])
    converted = maybe_move_tensor_to_cpu(sizes, as_numpy=True, record_stream=True)
    assert isinstance(converted, np.ndarray)
    assert converted.tolist() == [3, 0, 2]
    assert maybe_move_tensor_to_cpu(sizes) is sizes
    assert maybe_move_tensor_to_cpu([1], as_numpy=True) == [1]
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def in_new_process(code: str) -> str:
    """Run code and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_import_changes_nothing() -> None:
    code = """
import sys, torch
before = {n: id(v) for m in (torch, torch.cuda, torch.cuda.random) for n, v in vars(m).items()}
import mpotrain.engine.megatron.cpu
after = {n: id(v) for m in (torch, torch.cuda, torch.cuda.random) for n, v in vars(m).items()}
print([n for n in before if before[n] != after[n]])
print([m for m in sys.modules if m.startswith(('megatron', 'deepspeed'))])
print(torch._C._len_torch_function_stack())
"""
    assert in_new_process(code).split() == ["[]", "[]", "0"]


def test_the_first_install_compiles_nothing_and_spares_the_compiler() -> None:
    code = """
import sys, torch
before = {n: v for m in (torch.cuda, torch.cuda.random) for n, v in vars(m).items()}
compile_function = torch.compile
from mpotrain.engine.megatron import cpu
cpu.install()
import megatron.core.jit, megatron.core.fusions.fused_bias_swiglu as fused
print('torch._dynamo' in sys.modules, torch.compile is compile_function)
print(hasattr(fused.swiglu, '_torchdynamo_orig_callable'))
cpu.uninstall()
after = {n: v for m in (torch.cuda, torch.cuda.random) for n, v in vars(m).items()}
print([n for n in before if before[n] is not after[n]])
print(megatron.core.jit.jit_fuser is torch.compile is compile_function)
"""
    assert in_new_process(code).split() == ["False", "True", "False", "[]", "True"]


def test_what_an_earlier_import_compiled_runs_as_written() -> None:
    code = """
import torch, torch._dynamo
import megatron.core.fusions.fused_bias_swiglu as fused
print(hasattr(fused.swiglu, '_torchdynamo_orig_callable'))
from mpotrain.engine.megatron import cpu
counters = torch._dynamo.utils.counters
cpu.install()
print(tuple(fused.swiglu(torch.ones(2, 4)).shape), counters['frames']['total'])
cpu.uninstall()
print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())
print(counters['frames']['total'])
"""
    assert in_new_process(code).split("\n") == ["True", "(2, 2) 0", "2.0", "1"]


def test_what_is_imported_inside_works_outside() -> None:
    """Libraries that look at torch.cuda while they are imported must not keep the shim."""
    code = """
from mpotrain.engine.megatron import cpu
cpu.install()
import deepspeed
cpu.uninstall()
import torch, sys
held = [
    (name, key)
    for name, module in list(sys.modules.items())
    if module is not None and not name.startswith('mpotrain')
    for key, value in list(vars(module).items())
    if key != 'jit_fuser'  # megatron-core applies it while it is imported, and never again
    if getattr(value, '__module__', None) in (cpu.__name__, cpu.__name__ + '_collectives')
]
print(held)
"""
    assert in_new_process(code).splitlines()[-1] == "[]"
