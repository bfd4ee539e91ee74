"""Lets megatron-core's own code run on the CPU with gloo, for tests and small trials.

Megatron-core has no CPU mode: it allocates on `"cuda"` or `torch.cuda.current_device()` in some
two hundred places, orders work with streams and events, keeps its random streams in the CUDA
generator, and calls collectives that gloo lacks. While the shim is installed all of that means the
CPU; where CUDA is available it does nothing, so that GPUs run megatron-core as it is.

The shim reaches four things, and gives all of them back:

1. entry points of `torch.cuda` that need a driver (`_cuda_entry_points`);
2. a `TorchFunctionMode` for literal devices, `Tensor.cuda()` and `Tensor.type()` (`CudaMeansCpu`);
3. functions of megatron-core that look for CUDA tensors or lack a gloo counterpart
   (`_megatron_functions`, cpu_collectives.py);
4. functions that megatron-core hands to `torch.compile`, which wants a C++ compiler on the CPU and
   costs seconds for each process (`_import_without_compiling`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_ABSENT = object()


class OnlyStream:
    """Stands for every CUDA stream and event: on the CPU work is done in the order it is called."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnlyStream)

    def __hash__(self) -> int:
        return hash(OnlyStream)

    def _nothing(self, *args: object, **kwargs: object) -> None:
        """All earlier work is done already."""

    record = synchronize = wait = wait_event = wait_stream = _nothing

    def record_event(self, event: OnlyStream | None = None) -> OnlyStream:
        """Return the event; nothing is left to wait for."""
        return event or OnlyStream()

    def query(self) -> bool:
        """Return that all work is done."""
        return True

    def elapsed_time(self, end: OnlyStream) -> float:
        """Return 0 ms: events keep no time here."""
        return 0.0


class CudaMeansCpu(TorchFunctionMode):
    """Turns what names a CUDA device, in calls of torch functions on this thread, into the CPU.

    `Tensor.type()` does the reverse: megatron-core's optimizers sort parameters by the names of
    the CUDA tensor types and refuse all others.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function with the device replaced."""
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class _Shim:
    """What is in force: how often, on which threads, and how to undo it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.installed = 0
        self.undo = ExitStack()
        self.thread = _ThreadShim()


class _ThreadShim(threading.local):
    """A `TorchFunctionMode` holds for one thread."""

    installed = 0
    mode: CudaMeansCpu | None = None


_shim = _Shim()


def install() -> bool:
    """Make CUDA mean the CPU, on this thread, until `uninstall` has been called as often.

    Imports megatron-core. Torch functions called on other threads keep their meaning unless those
    threads install too.

    Returns:
        Whether the shim is in force; False, without any effect, where CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    with _shim.lock:
        if _shim.installed == 0:
            with ExitStack() as undo:
                _install_everywhere(undo)
                _shim.undo = undo.pop_all()
        _shim.installed += 1
        if _shim.thread.installed == 0:
            _shim.thread.mode = CudaMeansCpu()
            _push_on_torch_function_stack(_shim.thread.mode)
        _shim.thread.installed += 1
    return True


def uninstall() -> None:
    """Take one `install` of this thread back; after the last all is as before. Else do nothing."""
    with _shim.lock:
        if _shim.thread.installed == 0:
            return
        _shim.thread.installed -= 1
        if _shim.thread.installed == 0 and _shim.thread.mode is not None:
            _remove_mode(_shim.thread.mode)
            _shim.thread.mode = None
        _shim.installed -= 1
        if _shim.installed == 0:
            _shim.undo.close()


def _install_everywhere(undo: ExitStack) -> None:
    """Do what holds for all threads, in an order in which nothing sees half of it."""
    undo.enter_context(_import_without_compiling())
    _replace(undo, _cuda_entry_points())
    _replace(undo, _megatron_functions())
    import megatron.core.tensor_parallel.random as megatron_random

    log = logging.getLogger(megatron_random.__name__)
    log.addFilter(_is_no_false_alarm)
    undo.callback(log.removeFilter, _is_no_false_alarm)


def _replace(undo: ExitStack, replacements: Sequence[tuple[Any, str, Any]]) -> None:
    for owner, name, replacement in replacements:
        old = getattr(owner, name, _ABSENT)
        setattr(owner, name, replacement)
        if old is _ABSENT:
            undo.callback(delattr, owner, name)
        else:
            undo.callback(setattr, owner, name, old)


def _cuda_entry_points() -> list[tuple[Any, str, Any]]:
    """Return what replaces the functions and classes of `torch.cuda` that megatron-core calls.

    `manual_seed_all` stays: `torch.manual_seed` calls it, and without a device it does nothing.
    """
    cuda = torch.cuda
    return [
        (cuda, "current_device", lambda: _CPU),
        (cuda, "synchronize", lambda device=None: None),
        (cuda, "Stream", OnlyStream),
        (cuda, "Event", OnlyStream),
        (cuda, "current_stream", OnlyStream),
        (cuda, "default_stream", OnlyStream),
        (cuda, "stream", lambda stream: contextlib.nullcontext()),
        (cuda, "manual_seed", _seed),
        (cuda, "get_rng_state", _random_state),
        (cuda, "set_rng_state", _set_random_state),
        (cuda.random, "get_rng_state", _random_state),
        (cuda.random, "set_rng_state", _set_random_state),
    ]


def _megatron_functions() -> list[tuple[Any, str, Any]]:
    """Return what replaces functions of megatron-core, in the modules that call them."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    from mpotrain.engine.megatron import cpu_collectives as collectives

    gather = collectives.gather_along_first_dim(mappings._gather_along_first_dim)
    scatter = collectives.reduce_scatter_along_first_dim(mappings._reduce_scatter_along_first_dim)
    return [
        (mappings, "_gather_along_first_dim", gather),
        (mappings, "_reduce_scatter_along_first_dim", scatter),
        (megatron_random, "_get_cuda_rng_state", _random_state),
        (megatron_random, "_set_cuda_rng_state", _set_random_state),
        (token_dispatcher, "maybe_move_tensor_to_cpu", collectives.as_split_sizes),
    ]


@contextmanager
def _import_without_compiling() -> Iterator[None]:
    """Import megatron-core with its fused functions left as they are written, now and later.

    Its `jit_fuser` is `torch.compile`, and modules apply it while they are imported. Functions
    that an earlier import has compiled are run as written while the shim is in force.
    """
    with ExitStack() as undo:
        if "megatron.core.jit" in sys.modules and "torch._dynamo" in sys.modules:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        jit = _import_jit()
        _replace(undo, [(jit, "jit_fuser", jit.noop_decorator)])
        yield


def _import_jit() -> ModuleType:
    """Import `megatron.core.jit`, and what its package imports, with `torch.compile` idle."""
    with ExitStack() as undo:
        _replace(undo, [(torch, "compile", _as_written)])
        import megatron.core.jit as jit
    if jit.jit_fuser is _as_written:
        jit.enable_jit_fuser()
    module: ModuleType = jit
    return module


def _as_written(function: Any = None, **options: object) -> Any:
    return function if function is not None else _as_written


def _remove_mode(mode: CudaMeansCpu) -> None:
    """Take one mode out of this thread's stack, wherever it lies there."""
    stack = [_get_function_stack_at(place) for place in range(_len_torch_function_stack())]
    if not any(other is mode for other in stack):
        return
    above = []
    while (top := _pop_torch_function_stack()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_on_torch_function_stack(other)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _random_state(*args: object, **kwargs: object) -> Tensor:
    """Return the state of the CPU's default generator, which also serves as the CUDA generator."""
    return torch.get_rng_state()


def _set_random_state(new_state: Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Megatron-core warns if a random stream of the GPU moves the CPU's: here they are one."""
    return "CPU RNG state changed" not in record.getMessage()
