"""What ranks say to each other before any collective: JSON under keys of a c10d store."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mpotrain.errors import ParallelError
from mpotrain.parallel.environment import Ranks
from mpotrain.preflight.bounded import Countdown, Task
from mpotrain.preflight.layout import PER_NODE

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
LAST_ATTEMPT_SECONDS = 2.0
SHORTEST_WAIT = 0.01
"""Seconds; stores round shorter waits down to none, which means for ever."""


class LostContactError(ParallelError):
    """The first rank, which keeps the store, cannot be reached."""


class Channel:
    """Messages by key, every wait with a limit."""

    def __init__(self, store: Any) -> None:
        """Speak through a c10d store."""
        self._store = store

    def post(self, key: str, message: Mapping[str, Any]) -> None:
        """Leave a message for everybody.

        Raises:
            LostContactError: the store is gone.
        """
        try:
            self._store.set(key, json.dumps(message))
        except (dist.DistError, RuntimeError) as error:
            raise _lost(error) from error

    def fetch(self, key: str, seconds: float) -> dict[str, Any] | None:
        """Return a message; None if it does not come in time.

        Args:
            key: of the message.
            seconds: how long to wait; 0 = only look.

        Raises:
            LostContactError: the store is gone.
        """
        try:
            if seconds > 0:
                self._store.wait([key], timedelta(seconds=max(seconds, SHORTEST_WAIT)))
            elif not self._store.check([key]):
                return None
            message: dict[str, Any] = json.loads(self._store.get(key))
        except dist.DistStoreError:
            return None
        except (dist.DistError, RuntimeError) as error:
            raise _lost(error) from error
        return message

    def fetch_all(self, keys: Iterable[str], seconds: float) -> dict[str, dict[str, Any]]:
        """Return the messages under those keys that come in time.

        Args:
            keys: of the messages.
            seconds: how long to wait for all of them together.

        Raises:
            LostContactError: the store is gone.
        """
        left = Countdown(seconds)
        messages = {key: self.fetch(key, left.remaining) for key in keys}
        return {key: message for key, message in messages.items() if message is not None}

    def part(self, name: str) -> Store:
        """Return keys apart from all others, on a connection of their own for another thread."""
        return dist.PrefixStore(name, self._store.clone())  # type: ignore[attr-defined]


def open_channel(ranks: Ranks, seconds: float) -> Channel:
    """Reach the first rank, which keeps the store.

    Args:
        ranks: place of this process.
        seconds: how long to try.

    Raises:
        LostContactError: the first rank was not reached in time.
        ParallelError: this is the first rank, and its port is taken.
    """
    if ranks.size == 1:
        return Channel(dist.HashStore())  # type: ignore[attr-defined]
    assert ranks.master_addr is not None
    assert ranks.master_port is not None
    # torchrun keeps a store at this address already, through all restarts of its workers.
    agent = os.environ.get(AGENT_STORE) == "True" and ranks.launcher != PER_NODE
    keeps = ranks.rank == 0 and not agent
    where = f"{ranks.master_addr}:{ranks.master_port}"
    connect = partial(
        dist.TCPStore,  # type: ignore[attr-defined]
        ranks.master_addr,
        ranks.master_port,
        is_master=keeps,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )
    try:
        # torch takes twice its own time limit: it tries IPv6 and IPv4 one after the other.
        store = Task(connect, "the search").result(seconds)
    except (dist.DistError, RuntimeError, ValueError, TimeoutError) as error:
        if keeps:
            raise ParallelError(
                f"the first rank cannot listen at {where}: {_reason(error)}; choose another "
                "MASTER_PORT"
            ) from error
        reason = _why_not(ranks.master_addr, ranks.master_port)
        raise LostContactError(
            f"could not reach the first rank at {where} in {seconds:.0f} s: {reason}"
        ) from error
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"mpotrain-preflight/{restart}"
    return Channel(dist.PrefixStore(prefix, store))  # type: ignore[attr-defined]


def _lost(error: Exception) -> LostContactError:
    return LostContactError(f"lost contact with the first rank: {_reason(error)}")


def _why_not(address: str, port: int) -> str:
    """Return what the operating system says to one more attempt."""
    try:
        socket.create_connection((address, port), timeout=LAST_ATTEMPT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return "it was there too late"


def _reason(error: Exception) -> str:
    """Return what the operating system said, without torch's account of all its attempts."""
    text = str(error).strip()
    if match := re.search(r"errno: \d+ - ([^).]+)", text):
        return match[1]
    return "no answer" if "timed out" in text else text.splitlines()[0]
