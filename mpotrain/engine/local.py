"""The local engine: one process, plain torch. It defines what is correct."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mpotrain.batch import Batch, LossOutput
from mpotrain.engine.base import (
    MOMENTS,
    WEIGHT,
    EvalResult,
    StateReader,
    StateTensor,
    StepGuard,
    StepResult,
    skip_reason,
)
from mpotrain.engine.central_mask import CentralMask
from mpotrain.engine.config import NO_MASK, CentralMaskConfig, LocalConfig
from mpotrain.engine.evaluation import evaluate_batches
from mpotrain.engine.fragment import Fragment
from mpotrain.engine.gradients import (
    check_parameter_groups,
    norms_by_role,
    set_learning_rate,
    squares_by_role,
    total_norm,
)
from mpotrain.engine.layerwise import Layerwise, map_layers
from mpotrain.engine.state import fresh_adam_state, host_copy, read_checked
from mpotrain.engine.statistics import (
    StatisticsSum,
    balance_routers,
    export_buffers,
    import_buffers,
)
from mpotrain.engine.step_gate import StepGate, clip_coefficient
from mpotrain.engine.targets import count_targets
from mpotrain.errors import ConfigError, ParallelError
from mpotrain.nn.roles import Role, role_of
from mpotrain.parallel.ranks import World, microbatch_seed


class LocalEngine:
    """One process, fp32 parameters; a bf16 model casts what it computes with by itself.

    Attributes:
        world: the world of one.
        model: the bare model.
        num_updates: updates applied so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        config: LocalConfig,
        world: World,
        seed: int,
        clip_norm: float | None,
        central_mask: CentralMaskConfig = NO_MASK,
    ) -> None:
        """Take over a model and its optimizer.

        Args:
            model: returns a `LossOutput` for a `Batch`; its parameters are fp32.
            optimizer: AdamW, or another with the same state, over the model's parameters; groups
                carry "lr_factor".
            config: the engine section.
            world: a world of one.
            seed: seed of the run, for dropout.
            clip_norm: largest gradient norm that is let through; None = no clipping.
            central_mask: which updates of central tensors are discarded.

        Raises:
            ParallelError: the world has more than one rank.
            ConfigError: the optimizer's groups do not fit the model.
        """
        if world.size != 1:
            raise ParallelError(
                f"engine.kind: the local engine runs one process, the world has {world.size}"
            )
        found = check_parameter_groups(model, optimizer) + [
            f"{name}: {parameter.dtype}; the local engine keeps parameters in torch.float32"
            for name, parameter in model.named_parameters()
            if parameter.dtype != torch.float32
        ]
        if found:
            raise ConfigError(found)
        self.world = world
        self.model = model.to(world.device)
        self.num_updates = 0
        self._optimizer = optimizer
        self._config = config
        self._seed = seed
        self._clip_norm = clip_norm
        self._mask = CentralMask(central_mask, seed, optimizer.param_groups)
        self._gate = StepGate(optimizer, self._mask, self._fragment)
        if isinstance(optimizer, Layerwise):
            parameters = dict(model.named_parameters())
            shapes = {name: tuple(p.shape) for name, p in parameters.items()}
            flats = list(parameters.values())
            optimizer.use_layers(
                map_layers(flats, parameters, shapes, self._fragment, world, shared=True)
            )

    def step(
        self,
        microbatches: Sequence[Batch],
        *,
        lr: float,
        step: int,
        guard: StepGuard | None = None,
        detail: bool = False,
    ) -> StepResult:
        """Run one optimizer step; see `Engine.step`."""
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        targets = count_targets(microbatches, self.world)
        num_tokens = targets.num_tokens
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        statistics = StatisticsSum(self.world.device)
        for slot, batch in enumerate(microbatches):
            torch.manual_seed(microbatch_seed(self._seed, step, slot))
            output: LossOutput = self.model(targets.weigh(batch).to(self.world.device))
            loss_sum += output.loss_sum.detach()
            statistics.add(output.statistics)
            (output.objective / max(num_tokens, 1)).backward()  # type: ignore[no-untyped-call]
        gradients = self._gradients()
        squares = squares_by_role(gradients, self.world.device).tolist()
        loss, norm = loss_sum.item() / max(num_tokens, 1), total_norm(squares)
        reason = skip_reason(loss, norm, num_tokens, guard)
        counted = statistics.over_ranks(self.world)
        if reason is None:
            set_learning_rate(self._optimizer, lr)
            clip = clip_coefficient(norm, self._clip_norm)
            with self._gate.passing(True, step=step, clip=clip):
                self._optimizer.step()
            self._mask.count_update(step)
            balance_routers(self.model, counted)
            self.num_updates += 1
        self._optimizer.zero_grad(set_to_none=True)
        roles = (role_of(p) for p in self.model.parameters())
        return StepResult(
            loss=loss,
            grad_norm=norm,
            grad_norm_by_role=norms_by_role(squares, roles) if detail else None,
            num_tokens=num_tokens,
            skipped=reason is not None,
            reason=reason,
            statistics=counted,
        )

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Return the loss over `batches`; see `Engine.evaluate`."""

        def forward(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor] | None]:
            output: LossOutput = self.model(batch)
            return output.loss_sum, output.statistics

        return evaluate_batches(self.model, forward, batches, self.world, lockstep=False)

    def export_state(self) -> Iterator[StateTensor]:
        """Yield the training state parameter by parameter; see `Engine.export_state`."""
        for name, parameter in self.model.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            tensors = {WEIGHT: host_copy(parameter)}
            if self.num_updates:
                # A central tensor that has always rested has no moments yet.
                tensors |= {
                    moment: host_copy(state.get(moment, torch.zeros_like(parameter)))
                    for moment in MOMENTS
                }
            yield StateTensor(name, role_of(parameter), tuple(parameter.shape), tensors)
        yield from export_buffers(self.model, self.world)

    def counters(self) -> dict[str, int]:
        """Return Adam's counters of central tensors that rest now and then."""
        return dict(self._mask.updates)

    def import_state(
        self, read: StateReader, num_updates: int, counters: Mapping[str, int] | None = None
    ) -> None:
        """Replace the training state; see `Engine.import_state`."""
        self._mask.load(counters, num_updates)
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        self._optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            tensors = read_checked(read, name, tuple(parameter.shape), num_updates)
            parameter.data.copy_(tensors[WEIGHT])
            if num_updates:
                group = groups[id(parameter)]
                count = self._mask.group_updates(group, num_updates)
                state = fresh_adam_state(group, parameter, count)
                for moment in MOMENTS:
                    state[moment].copy_(tensors[moment])
                self._optimizer.state[parameter] = state
        import_buffers(self.model, read)
        self.num_updates = num_updates

    def full_parameters(self) -> AbstractContextManager[None]:
        """Do nothing: weights are always whole here."""
        return nullcontext()

    def close(self) -> None:
        """Drop gradients and give the optimizer its own step back."""
        self._optimizer.zero_grad(set_to_none=True)
        self._gate.remove()

    def _fragment(self, name: str) -> Fragment:
        parameter = self.model.get_parameter(name)
        return Fragment(0, parameter.numel(), parameter, 0)

    def _gradients(self) -> list[tuple[Role, Tensor]]:
        """Return all gradients; a parameter that took no part has a zero one, as in ZeRO."""
        found = []
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append((role_of(parameter), parameter.grad))
        return found
