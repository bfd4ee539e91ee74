"""What stands between our objects and DeepSpeed: a module, a gate and an opened model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mpotrain.batch import Batch


class LossModule(nn.Module):
    """Turns a model's `LossOutput` into the bare loss tensor.

    DeepSpeed hangs its work before backward on the output tensors of a module and finds them in
    tensors and plain containers alone; a dataclass passes by unseen, and gradients of one
    micro-batch would be counted again in the next.
    """

    def __init__(self, model: nn.Module, *, bare_call: bool) -> None:
        """Wrap a model.

        Args:
            model: returns a `LossOutput`.
            bare_call: call its `forward` without its hooks. Stage 3 needs that: parameters that
                the model itself uses (positions, a tied head) are then gathered by this module,
                whose output it can see, in backward too.
        """
        super().__init__()
        self.model = model
        self._bare_call = bare_call

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss of a micro-batch, scalar."""
        call = self.model.forward if self._bare_call else self.model
        loss_sum: Tensor = call(batch).loss_sum
        return loss_sum


class StepGate:
    """Stands in an optimizer's `step` and lets it through or not.

    Every ZeRO stage prepares gradients, calls the client optimizer's `step`, copies masters to
    weights and clears its buffers. With the gate shut all of this runs but the update itself, so
    masters, moments and counters stay as they were, and the copy changes nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._step: Callable[..., Any] = optimizer.step
        self._open = True
        optimizer.step = self._gated  # type: ignore[assignment, method-assign]

    @contextmanager
    def passing(self, allowed: bool) -> Iterator[None]:
        """Open or shut the gate for the length of a block."""
        self._open = allowed
        try:
            yield
        finally:
            self._open = True

    def remove(self) -> None:
        """Give the optimizer its own `step` back."""
        self._optimizer.__dict__.pop("step", None)

    def _gated(self, closure: Callable[[], float] | None = None) -> float | None:
        if not self._open:
            return None
        result: float | None = self._step(closure)
        return result


@contextmanager
def whole_parameters(deepspeed: ModuleType, engine: Any, model: nn.Module) -> Iterator[None]:
    """Gather all split parameters and lift DeepSpeed's hooks from the model.

    With the hooks in place a forward pass would give parameters back after each module, and a
    rank that runs alone would wait for the others at the next gather.

    Args:
        deepspeed: the imported package.
        engine: a stage-3 `DeepSpeedEngine`.
        model: the bare model.
    """
    offload = engine.optimizer.parameter_offload
    lifted = {handle.id for handle in (*offload.forward_hooks, *offload.backward_hooks)}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        saved = [
            (module, module._forward_pre_hooks, module._forward_hooks)
            for module in engine.module.modules()
        ]
        for module, before, after in saved:
            module._forward_pre_hooks = _without(before, lifted)
            module._forward_hooks = _without(after, lifted)
        try:
            yield
        finally:
            for module, before, after in saved:
                module._forward_pre_hooks = before
                module._forward_hooks = after


def _without(hooks: Any, lifted: set[int]) -> OrderedDict[int, Any]:
    return OrderedDict((key, hook) for key, hook in hooks.items() if key not in lifted)
