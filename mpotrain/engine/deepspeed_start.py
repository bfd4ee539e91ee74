"""Importing DeepSpeed without its surprises.

On a CPU `deepspeed.init_distributed` compiles a shared-memory all-reduce that only inference uses:
45 s and a C++ compiler, and a process killed meanwhile leaves a lock file for which every later
start waits for ever, without a word. The operation is declared unavailable before DeepSpeed asks.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mpotrain.errors import ConfigError
from mpotrain.parallel.ranks import World

_LOGGER = logging.getLogger(__name__)
_OLD_NAMES = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
_SHARED_MEMORY_OP = "deepspeed_shm_comm"
STALE_AFTER = 600.0
"""Seconds after which a compile lock counts as left over."""


def start_deepspeed(world: World) -> ModuleType:
    """Import DeepSpeed and let it join the process group of `world`.

    Args:
        world: an initialised world with a process group.

    Returns:
        The module `deepspeed`, ready for `initialize`.

    Raises:
        ConfigError: DeepSpeed is not installed, or the world has no process group.
    """
    if world.backend is None:
        raise ConfigError(
            ['engine.kind: "deepspeed" needs a process group; join it with init_world("deepspeed")']
        )
    # An empty value is an error for DeepSpeed, and unset it would take CUDA on a CPU run.
    os.environ["DS_ACCELERATOR"] = world.device.type
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            [
                f"engine.kind: DeepSpeed cannot be imported ({error}); "
                'install it with pip install "mpotrain[deepspeed]"'
            ]
        ) from error
    if world.device.type == "cpu":
        _refuse_to_compile(deepspeed.ops)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls torch by names that torch is about to change: nothing a user can mend.
    warnings.filterwarnings("ignore", message=_OLD_NAMES, category=FutureWarning)
    for lock in stale_locks(extensions_folder(os.environ), time.time()):
        _LOGGER.warning(
            "%s: left by a process killed while it compiled a torch extension; programs that need "
            "this extension will wait for it for ever: delete it if nothing is compiling",
            lock,
        )
    deepspeed.init_distributed(dist_backend=world.backend, verbose=False)
    module: ModuleType = deepspeed
    return module


def extensions_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder where torch keeps the extensions that it compiles."""
    chosen = environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions"


def stale_locks(folder: Path, now: float, older_than: float = STALE_AFTER) -> list[Path]:
    """Find compile locks that a killed process has left.

    Args:
        folder: the extensions folder; it need not exist.
        now: seconds since the epoch.
        older_than: seconds; younger locks belong to a compiler at work.

    Returns:
        Paths of the locks, sorted.
    """
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    found = []
    for lock in sorted(locks):
        try:
            age = now - lock.stat().st_mtime
        except OSError:  # its owner has just finished
            continue
        if age > older_than:
            found.append(lock)
    return found


def _refuse_to_compile(ops: Any) -> None:
    # DeepSpeed looks operations up in this table, which it fills lazily.
    table = ops.__dict__.setdefault("__compatible_ops__", {})
    table[_SHARED_MEMORY_OP] = False
