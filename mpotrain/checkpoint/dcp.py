"""The two calls into torch.distributed.checkpoint, with its errors made ordinary.

They run without collectives: who writes what is settled before, and a failure of one process must
not leave the others waiting. Its `CheckpointException` derives from `BaseException` and would
slip past `except Exception`; here it is replaced by what was raised inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter


def save_tensors(tensors: dict[str, Tensor], writer: StorageWriter) -> None:
    """Write tensors of this process.

    Args:
        tensors: tensors by full name.
        writer: where they go.

    Raises:
        OSError: from the file system, as it was raised.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _plain_errors():
        save(tensors, storage_writer=writer, planner=planner, no_dist=True)


def load_tensors(tensors: dict[str, Tensor], reader: StorageReader) -> None:
    """Fill tensors of this process in place.

    Args:
        tensors: destinations by full name; a DTensor receives its own shard.
        reader: where they come from.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _plain_errors():
        load(tensors, storage_reader=reader, planner=planner, no_dist=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            inner = [failure for failure, _ in error.failures.values()]
            if not inner:
                raise RuntimeError(str(error)) from error
            raise inner[0] from None
