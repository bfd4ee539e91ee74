"""LAMB: Adam with an update that is as long as the weights of its layer (You et al. 2020).

Every layer's update is scaled to the norm of its weights, so that one learning rate fits layers of
all sizes and batches may be large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mpotrain.engine.layerwise import Layers, WholeTensors
from mpotrain.engine.state import fresh_adam_state


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2, with bias correction).

    With Adam's moments m and v of gradient g after t updates, for each layer

        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w = w - lr * trust * u,    trust = ||w|| / ||u||, kept between min_trust and max_trust

    and trust = 1 where either norm is zero, and for groups with `adapt` False. The state is that of
    AdamW: `step` on the host, `exp_avg`, `exp_avg_sq`.

    A layer is a whole tensor unless an engine says where layers lie (`use_layers`): ZeRO hands an
    optimizer vectors that are no layers.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        min_trust: float | None = None,
        max_trust: float | None = None,
    ) -> None:
        """Take over parameters.

        Args:
            params: parameters or groups of them; a group may have options of its own, `adapt`
                (True by default) among them.
            lr: learning rate.
            betas: decay rates of the moments.
            eps: added to the root of the second moment.
            weight_decay: lambda, part of the update that trust scales.
            min_trust: least trust; None = no bound.
            max_trust: largest trust; None = no bound.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "min_trust": min_trust,
            "max_trust": max_trust,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self._layers: Layers = WholeTensors()

    def use_layers(self, layers: Layers) -> None:
        """Take norms by `layers` from now on."""
        self._layers = layers

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update everything that has a gradient; collective where layers are spread over ranks.

        Args:
            closure: computes loss and gradients anew; None = the gradients are there.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(fresh_adam_state(group, parameter, 0))
        beta1, beta2 = group["betas"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        count = float(state["step"])
        # As torch.optim.AdamW does it, so that moments can pass from one to the other.
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = second.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        update = torch.div(first, root, out=root).div_(1 - beta1**count)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        if group["adapt"]:
            self._layers.scale_(parameter, update, self._trust(parameter, update, group))
        parameter.add_(update, alpha=-group["lr"])

    def _trust(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the trust of each layer, float64 (L,)."""
        weights, updates = self._layers.squares(parameter, [parameter, update]).sqrt()
        ratio = weights / updates
        low, high = group["min_trust"], group["max_trust"]
        if low is not None or high is not None:
            ratio = ratio.clamp(low, high)
        return torch.where((weights > 0) & (updates > 0), ratio, torch.ones_like(ratio))
