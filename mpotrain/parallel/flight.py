"""What torch's flight recorders know of the last collectives of this process.

torch keeps a ring of collectives for each kind of back end: one for NCCL, one for all others (gloo
among them). A collective that was begun and not retired is what a rank waits in.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

SIZE_KEYS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Environment variables with the number of collectives that are kept; new name, old name."""
NUM_KEPT = 2000
"""Collectives that are kept where nobody says otherwise: a few hundred bytes each."""
RECORDERS = {"nccl": "_dump_nccl_trace_json", "other": "_dump_fr_trace_json"}
"""Function of torch that writes a recorder as JSON, by kind of back end; builds without NCCL lack
the first."""


def keep_collectives(environ: MutableMapping[str, str]) -> None:
    """Switch the recorders on unless the environment says how much they keep.

    To be called before the first process group exists: torch reads the variables once.

    Args:
        environ: variables to set, usually `os.environ`.
    """
    if not any(key in environ for key in SIZE_KEYS):
        environ[SIZE_KEYS[0]] = str(NUM_KEPT)


def recorded_collectives() -> dict[str, Any]:
    """Return what each recorder of this build holds, by kind of back end.

    A recorder that fails is an entry with `error`: whoever asks is in trouble already.
    """
    # No import: the thread that hangs may hold the lock of one.
    module = getattr(sys.modules.get("torch._C"), "_distributed_c10d", None)
    found: dict[str, Any] = {}
    for kind, function in RECORDERS.items():
        dump = getattr(module, function, None)
        if dump is None:
            continue
        try:
            found[kind] = json.loads(dump())
        except Exception as error:
            found[kind] = {"error": f"{type(error).__name__}: {error}"}
    return found


def waiting_collectives(recorded: Mapping[str, Any], now: float | None = None) -> list[str]:
    """Return one line for each collective that was begun and has not ended, oldest first.

    Args:
        recorded: what `recorded_collectives` returned.
        now: seconds since the epoch; by default the present.
    """
    now = time.time() if now is None else now
    return [_line(entry, now) for entry in _entries(recorded) if not entry.get("retired", True)]


def _entries(recorded: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for trace in recorded.values():
        yield from trace.get("entries", ())


def _line(entry: Mapping[str, Any], now: float) -> str:
    name, description = [*entry.get("process_group", ()), "?", "?"][:2]
    number = entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id", "?")
    types, sizes = entry.get("input_dtypes", ()), entry.get("input_sizes", ())
    inputs = ", ".join(f"{kind} {size}" for kind, size in zip(types, sizes, strict=False))
    seconds = now - entry.get("time_created_ns", 0) / 1e9
    return (
        f"{entry.get('profiling_name', 'collective')} number {number} of group {name} "
        f"({description}), {inputs or 'no tensor'}, for {seconds:.1f} s"
    )
