"""Tokenizing in parallel processes; results come back in document order.

Processes are spawned, not forked: they inherit neither torch nor threads nor locks. They end
with their parent, even if it is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpotrain.data.feed import Parcel
from mpotrain.data.tokenizer import Tokenizer, open_tokenizer
from mpotrain.errors import DataError

Tokens = list[NDArray[np.int32]]
MAX_DEFAULT_WORKERS = 16
"""One reading process cannot feed many more."""

_tokenizer: Tokenizer | None = None


def default_num_workers() -> int:
    """Return one process for each CPU that this process may use, within reason."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_DEFAULT_WORKERS)
    return min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS)


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """Return the ids of each text, closed by the end-of-text token where there is one."""
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    return [np.array(tokenizer.encode(text) + end, dtype=np.int32) for text in texts]


def tokenize(
    parcels: Iterable[Parcel[str]], path: Path, tokenizer: Tokenizer, num_workers: int
) -> Iterator[tuple[Parcel[str], Tokens]]:
    """Tokenize parcels, in order, with a bounded number of them under way.

    Args:
        parcels: the texts.
        path: file of the tokenizer, for the processes to load.
        tokenizer: the same, loaded.
        num_workers: processes; 0 works in this one.

    Yields:
        Each parcel with the ids of its documents.

    Raises:
        DataError: a process died.
    """
    if num_workers == 0:
        for parcel in parcels:
            yield parcel, encode_documents(tokenizer, parcel.documents)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        max_workers=num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(path, tokenizer.eot_id),
    )
    pending: deque[tuple[Parcel[str], Future[Tokens]]] = deque()
    try:
        for parcel in parcels:
            pending.append((parcel, pool.submit(_encode, parcel.documents)))
            if len(pending) > 2 * num_workers:
                yield _next(pending)
        while pending:
            yield _next(pending)
    except (BrokenProcessPool, BrokenPipeError, ConnectionResetError, EOFError) as error:
        # A process that dies while another one is being started leaves that other one running,
        # and the shutdown below would wait for it for ever (seen with Python 3.11).
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        _release_writer(pool)
        raise DataError(
            "a tokenizing process died (out of memory, or killed); finished shards are kept: run "
            "the same command again with fewer num_workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _release_writer(pool: ProcessPoolExecutor) -> None:
    """Let the thread give up that writes to processes of which none is left.

    Before Python 3.11.5 it keeps writing into a full pipe, and the shutdown waits for it for ever
    (gh-94777). As in later versions, it ends when nobody holds the other end of the pipe.
    """
    if sys.version_info < (3, 11, 5):
        with contextlib.suppress(AttributeError, OSError):
            pool._call_queue._reader.close()  # type: ignore[attr-defined]


def _next(pending: deque[tuple[Parcel[str], Future[Tokens]]]) -> tuple[Parcel[str], Tokens]:
    parcel, future = pending.popleft()
    return parcel, future.result()


def _start(path: Path, eot_id: int | None) -> None:
    """Prepare a process: leave Ctrl-C to the parent, die with the parent, load the tokenizer."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = open_tokenizer(path, eot_id)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode(texts: list[str]) -> Tokens:
    if _tokenizer is None:
        raise RuntimeError("the process was not started by `tokenize`")
    return encode_documents(_tokenizer, texts)
