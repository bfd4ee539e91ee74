"""Megatron-core's groups around a piece of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World


@contextmanager
def megatron_grid(world: World, parallel: ParallelConfig) -> Iterator[None]:
    """Install the shim where there is no GPU, start all groups, and end both."""
    from mpotrain.engine.megatron import cpu

    cpu.install()
    try:
        from mpotrain.engine.megatron.start import start_megatron, stop_megatron

        start_megatron(parallel)
        try:
            yield
        finally:
            stop_megatron()
    finally:
        cpu.uninstall()
