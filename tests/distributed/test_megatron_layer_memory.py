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
        self._watched: dict[int, tuple[StorageWeakRef, int]] = {}
        self._older: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self._watched:
                    self._older.add(key)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                # While it is watched no other storage gets this address.
                if storage._cdata not in self._older | self._watched.keys():
                    self._watched[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        """Return the bytes of those that exist still."""
        return sum(nbytes for ref, nbytes in self._watched.values() if not ref.expired())

    def settled(self, nbytes: int, seconds: float = 2.0) -> int:
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
            assert states == 8 * LENGTH * BATCH * HIDDEN // (parallel.tensor if layout else 1)
            found.append(made.settled(2 * states) / states)
            y.sum().backward()
            del y
            # Nothing stays behind the backward pass but gradients, of parameters and of the inputs.
            gradients = [p.grad for p in block.parameters()] + [x.grad]
            assert all(gradient is not None for gradient in gradients[:-1])
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
