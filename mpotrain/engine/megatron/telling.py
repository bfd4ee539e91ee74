"""What the chunks of all ranks tell of a step: losses and statistics, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpotrain.engine.megatron.groups import Groups
from mpotrain.engine.megatron.micro import Tally
from mpotrain.parallel.ranks import World

Layout = list[tuple[tuple[str, str], tuple[int, ...]]]
"""Key (mixture or "", name) and shape of every sum, in one order on all ranks."""


class Telling:
    """Adds up tallies, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}

    def add(self, tally: Tally) -> None:
        """Add what one micro-batch told."""
        found = {("", name): value for name, value in tally.sums.items()}
        for mixture, statistics in tally.told.items():
            found |= {(mixture, name): value for name, value in statistics.items()}
        self._add(found)

    def merge(self, other: Telling) -> None:
        """Add what other micro-batches told."""
        self._add(other.sums)

    def _add(self, found: Mapping[tuple[str, str], Tensor]) -> None:
        for key, value in found.items():
            value = value.detach().to(torch.float64)
            self.sums[key] = self.sums[key] + value if key in self.sums else value


class Collector:
    """Brings tellings of all ranks together; the layout of sums is agreed upon once per mode."""

    def __init__(self, world: World, groups: Groups, mixtures: Sequence[str]) -> None:
        """Prepare.

        Args:
            world: all ranks.
            groups: of this rank.
            mixtures: logical names of all mixtures, in the order of their statistics.
        """
        self._world, self._mixtures = world, list(mixtures)
        is_first = groups.tensor.rank() == 0
        # Tensor-parallel ranks tell the same; of mixtures context-parallel ranks do, too.
        self._counts = {False: is_first, True: is_first and groups.context.rank() == 0}
        self._layouts: dict[str, Layout] = {}

    def collect(self, telling: Telling, mode: str) -> tuple[float, dict[str, Tensor]]:
        """Return the summed loss and the statistics of all ranks (collective).

        Args:
            telling: of this rank.
            mode: "train" or "evaluate": a network tells the same names in every step of a mode.
        """
        layout = self._layouts.get(mode) or self._agree(telling)
        if len(layout) > 1:  # without a batch there was nothing to agree upon yet
            self._layouts[mode] = layout
        unknown = telling.sums.keys() - {key for key, _ in layout}
        if unknown:
            raise RuntimeError(f"statistics {sorted(unknown)} are new in a later {mode} step")
        parts = []
        for key, shape in layout:
            value = telling.sums.get(key) if self._counts[bool(key[0])] else None
            zeros = torch.zeros(shape, dtype=torch.float64, device=self._world.device)
            parts.append((zeros if value is None else value.to(self._world.device)).reshape(-1))
        joined = self._world.all_reduce_sum(torch.cat(parts)).cpu()
        pieces = torch.split(joined, [part.numel() for part in parts])
        found = {key: piece.view(shape) for (key, shape), piece in zip(layout, pieces, strict=True)}
        loss = float(found.pop(("", "loss_sum")))
        return loss, self._named(found)

    def _agree(self, telling: Telling) -> Layout:
        own = {key: tuple(value.shape) for key, value in telling.sums.items()}
        merged: dict[tuple[str, str], tuple[int, ...]] = {("", "loss_sum"): ()}
        for part in self._world.gather_objects(own):
            merged |= part
        return sorted(merged.items())

    def _named(self, found: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        """Return statistics by name; those of mixtures stacked in the order of the network."""
        result = {name: value for (mixture, name), value in found.items() if not mixture}
        for name in sorted({name for mixture, name in found if mixture}):
            result[name] = torch.stack([found[mixture, name] for mixture in self._mixtures])
        return result
