"""The gradient mask of MPOE: central tensors that rest for a step (Gao et al. 2022, section 3.2).

At every step an update of a central tensor is discarded with probability p_b (Algorithm 1). With
Adam, zeroing the gradient would still move the tensor, by momentum and by decay; here a resting
tensor keeps its value, its moments and its counter bit for bit. The norm that clipping uses is that
of the whole gradient, resting tensors included.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpotrain.engine.base import MOMENTS
from mpotrain.engine.config import CentralMaskConfig
from mpotrain.engine.fragment import Fragment
from mpotrain.parallel.seeds import mask_seed, mask_uniform

CENTRAL = "central"
"""Key of an optimizer group that holds central tensors alone: their logical names."""

FragmentOf = Callable[[str], Fragment | None]
"""Returns this rank's part of a parameter's master weights by logical name."""


class CentralMask:
    """Decides what rests and keeps Adam's counters of the tensors that do not always move.

    Attributes:
        updates: updates applied to each central tensor, by logical name; empty where all of them
            have taken part in every update (no mask, or one that works on elements).
    """

    def __init__(
        self, config: CentralMaskConfig, seed: int, groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Look for groups of central tensors.

        Args:
            config: probability and granularity.
            seed: seed of the run.
            groups: the optimizer's parameter groups; those to be masked have the key `CENTRAL`.
        """
        self._config, self._seed = config, seed
        self._active = config.probability > 0
        sizes = {
            name: parameter.numel()
            for group in groups
            for name, parameter in zip(group.get(CENTRAL, ()), group["params"], strict=False)
        }
        self._sizes = sizes if self._active else {}
        self._together = [list(group.get(CENTRAL, ())) for group in groups]
        counts = self._active and config.granularity != "element"
        self.updates: dict[str, int] = dict.fromkeys(sizes, 0) if counts else {}

    def rests(self, name: str, step: int) -> bool:
        """Return whether a whole central tensor keeps its value in this step."""
        if not self._active or self._config.granularity == "element":
            return False
        # One draw for all tensors, or one for each of them.
        key = 0 if self._config.granularity == "step" else zlib.crc32(name.encode())
        return mask_uniform(self._seed, step, key) < self._config.probability

    def awake(self, groups: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Return the optimizer groups that are updated in this step."""
        return [group for group in groups if not self._group_rests(group, step)]

    @contextmanager
    def keeping_elements(
        self, optimizer: torch.optim.Optimizer, step: int, fragment_of: FragmentOf
    ) -> Iterator[None]:
        """Put back the resting elements of values and moments after an update.

        Args:
            optimizer: updates some or all of its groups inside the block.
            step: number of the step.
            fragment_of: where the values lie.
        """
        held = self._hold(optimizer, step, fragment_of) if self._active else []
        yield
        for resting, fragment, before in held:
            state = optimizer.state[fragment.flat]
            for target, old in zip(_vectors(fragment, state), before, strict=True):
                if target is not None:
                    kept = torch.zeros_like(target) if old is None else old
                    target.copy_(torch.where(resting, kept, target))

    def count_update(self, step: int) -> None:
        """Note that the update of `step` was applied to everything that did not rest."""
        for name in self.updates:
            self.updates[name] += not self.rests(name, step)

    def group_updates(self, group: Mapping[str, Any], num_updates: int) -> int:
        """Return Adam's counter of a group; `num_updates` for groups that never rest."""
        counts = [self.updates[name] for name in group.get(CENTRAL, ()) if name in self.updates]
        return max(counts, default=num_updates)

    def load(self, updates: Mapping[str, int] | None, num_updates: int) -> None:
        """Take up the counters of a checkpoint.

        Args:
            updates: counters by logical name; tensors without one (the mask was off) count as
                updated every time.
            num_updates: updates of everything else.
        """
        for name in self.updates:
            self.updates[name] = (updates or {}).get(name, num_updates)
        # Tensors of one group have one counter; where they come from groups of their own (another
        # granularity before) the largest is taken for all.
        for names in self._together:
            counted = [name for name in names if name in self.updates]
            if counted:
                most = max(self.updates[name] for name in counted)
                self.updates |= dict.fromkeys(counted, most)

    def _group_rests(self, group: Mapping[str, Any], step: int) -> bool:
        names = group.get(CENTRAL, ())
        return bool(names) and all(self.rests(name, step) for name in names)

    def _hold(
        self, optimizer: torch.optim.Optimizer, step: int, fragment_of: FragmentOf
    ) -> list[tuple[Tensor, Fragment, list[Tensor | None]]]:
        if self._config.granularity != "element":
            return []
        here = {id(p) for group in optimizer.param_groups for p in group["params"]}
        held = []
        for name in self._sizes:
            fragment = fragment_of(name)
            if fragment is None or id(fragment.flat) not in here:
                continue
            before = [
                None if vector is None else vector.clone()
                for vector in _vectors(fragment, optimizer.state.get(fragment.flat, {}))
            ]
            held.append((self._resting_elements(name, step, fragment), fragment, before))
        return held

    def _resting_elements(self, name: str, step: int, fragment: Fragment) -> Tensor:
        """Draw for all elements of the tensor, as every rank does, and keep the fragment's."""
        generator = torch.Generator()
        generator.manual_seed(mask_seed(self._seed, step, zlib.crc32(name.encode())))
        draws = torch.rand(self._sizes[name], generator=generator)
        own = fragment.elements(draws)
        return (own < self._config.probability).to(fragment.flat.device)


def _vectors(fragment: Fragment, state: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Return views of the fragment's values and moments; None for moments not yet there."""
    moments = [state.get(moment) for moment in MOMENTS]
    return [
        fragment.of(fragment.flat),
        *(None if moment is None else fragment.of(moment) for moment in moments),
    ]
