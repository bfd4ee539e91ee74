"""What stands between our objects and DeepSpeed: a module and an opened model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from mpotrain.batch import Batch, LossOutput


class LossModule(nn.Module):
    """Turns a model's `LossOutput` into bare tensors: objective, loss and statistics.

    DeepSpeed hangs its work before backward on the output tensors of a module and finds them in
    tensors and plain containers alone; a dataclass passes by unseen, and gradients of one
    micro-batch would be counted again in the next.
    """

    def __init__(
        self, model: nn.Module, *, bare_call: bool, marker: nn.Module | None = None
    ) -> None:
        """Wrap a model.

        Args:
            model: returns a `LossOutput`.
            marker: empty module by which DeepSpeed sees that there are experts.
            bare_call: call its `forward` without its hooks. Stage 3 needs that: parameters that
                the model itself uses (positions, a tied head) are then gathered by this module,
                whose output it can see, in backward too.
        """
        super().__init__()
        self.model = model
        self.marker = marker
        self._bare_call = bare_call

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the objective and the loss of a micro-batch, both sums, and its statistics."""
        call = self.model.forward if self._bare_call else self.model
        output: LossOutput = call(batch)
        return output.objective, output.loss_sum.detach(), dict(output.statistics or {})


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
