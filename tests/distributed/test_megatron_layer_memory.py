"""What layers of the Megatron engine keep between the forward and the backward pass, in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed.megatron_comparison import Sequences, make_micro
from distributed.megatron_grid import megatron_grid
from distributed.megatron_layer_cases import (
    BATCH,
    HEADS,
    HIDDEN,
    LAYOUTS,
    LENGTH,
    Case,
    build_block,
    local_layers,
    make_inputs,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

Run = Callable[[int], Callable[..., list[Any]]]


class Made(TorchDispatchMode):
    """Watches the storages of all floating-point tensors that come into being in a block."""

    def __init__(self) -> None:
        super().__init__()
        # A reference keeps the address, so no later storage is taken for one that is gone.
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._see((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, is_new=True)
        return result

    def _see(self, tensors: Any, *, is_new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                nbytes = storage.nbytes() if is_new and tensor.is_floating_point() else 0
                self._seen.setdefault(storage._cdata, (StorageWeakRef(storage), nbytes))

    def alive(self) -> int:
        """Return the bytes of those that exist still."""
        return sum(nbytes for ref, nbytes in self._seen.values() if not ref.expired())

    def settled(self, nbytes: int, seconds: float = 20.0) -> int:
        """Return the bytes that stay; gloo's thread lets go of tensors a little late."""
        deadline = time.monotonic() + seconds
        while self.alive() > nbytes and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.alive()


def kept(world: World, layout: dict[str, Any], recompute: bool, kinds: list[str]) -> list[float]:
    """Return what two layers keep until the backward pass, in hidden states of the rank."""
    parallel = ParallelConfig(**layout)
    found = []
    with megatron_grid(world, parallel):
        for kind in kinds:
            case = Case(kind, recompute=recompute)
            given, ranks = make_inputs(case), Sequences(parallel)
            block, _ = build_block(local_layers(case), parallel, case)
            x = ranks.enter(ranks.mine(given.x).requires_grad_())
            context = None if given.terms is None else ranks.enter(ranks.mine(given.memory))
            terms = given.terms
            if terms is not None:
                terms = terms[:, : HEADS // parallel.tensor].clone().requires_grad_()
            micro = make_micro(seen=given.seen, terms=terms)
            made = Made()
            with made:
                y = block(
                    hidden_states=x, attention_mask=None, context=context, attention_bias=micro
                )
            micro.tally.is_open = False
            states = x.numel() * x.element_size()
            assert states == 8 * LENGTH * BATCH * HIDDEN // parallel.tensor
            nbytes = made.settled(2 * states) if recompute else made.alive()
            found.append(nbytes / states)
            y.sum().backward()
            del y
            # Nothing that the forward pass made outlives the backward pass.
            assert made.settled(0) == 0
    return found


KINDS = ["gpt2", "pre-norm", "post-norm", "t5"]


@pytest.mark.parametrize("layout", ["one rank", "tp 2 sp"])
def test_recomputed_layers_keep_their_inputs_alone(run_ranks: Run, layout: str) -> None:
    size, degrees = LAYOUTS[layout]
    for told in run_ranks(size)(kept, degrees, True, KINDS):
        # What lies between the two layers, and what comes out of them.
        assert told == [2.0] * len(KINDS)
    for told in run_ranks(size)(kept, degrees, False, KINDS):
        assert min(told) > 8
