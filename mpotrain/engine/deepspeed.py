"""The DeepSpeed engine: ZeRO stages 0 to 3 in fp32, 1 to 3 in bf16, with offload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mpotrain.batch import Batch
from mpotrain.engine.base import (
    WEIGHT,
    EvalResult,
    StateReader,
    StateTensor,
    StepGuard,
    StepResult,
    skip_reason,
)
from mpotrain.engine.central_mask import CentralMask
from mpotrain.engine.config import NO_MASK, CentralMaskConfig, DeepSpeedConfig, problems
from mpotrain.engine.deepspeed_experts import ExpertShards
from mpotrain.engine.deepspeed_json import deepspeed_json
from mpotrain.engine.deepspeed_modules import LossModule, whole_parameters
from mpotrain.engine.deepspeed_partition import partition_of
from mpotrain.engine.deepspeed_start import start_deepspeed
from mpotrain.engine.deepspeed_state import export_fragments, import_fragments
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
from mpotrain.engine.state import host_copy
from mpotrain.engine.statistics import (
    StatisticsSum,
    balance_routers,
    export_buffers,
    import_buffers,
)
from mpotrain.engine.step_gate import StepGate, clip_coefficient
from mpotrain.engine.targets import Targets, count_targets
from mpotrain.errors import ConfigError, ParallelError
from mpotrain.nn.roles import Role, experts_of, role_of
from mpotrain.parallel.ranks import World, microbatch_seed


class DeepSpeedEngine:
    """ZeRO data parallelism behind the seam of `Engine`.

    DeepSpeed reduces gradients, clips and updates. This class decides what DeepSpeed cannot: the
    loss is normalised by the tokens of the whole global batch, the gradient norm is the same
    number in every stage, and an update can be refused.

    Attributes:
        world: the ranks.
        model: the bare model.
        num_updates: updates applied so far.
        json: the configuration that DeepSpeed got.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        config: DeepSpeedConfig,
        world: World,
        seed: int,
        clip_norm: float | None,
        micro_batch_size: int,
        accumulation: int,
        global_batch_size: int,
        expert_ranks: int = 1,
        central_mask: CentralMaskConfig = NO_MASK,
    ) -> None:
        """Hand a model and its optimizer to DeepSpeed.

        Args:
            model: returns a `LossOutput` for a `Batch`; fp32 parameters with the same values on
                all ranks. Every parameter takes part in every micro-batch, and sub-modules pass
                tensors (or tuples, lists, dicts of them): stage 3 sees no others.
            optimizer: AdamW, or another with the same state, over the model's parameters; groups
                carry "lr_factor".
            config: the engine section.
            world: an initialised world with a process group.
            seed: seed of the run, for dropout.
            clip_norm: largest gradient norm that is let through; None = no clipping.
            micro_batch_size: sequences in a forward pass.
            accumulation: micro-batches in a step on each rank.
            global_batch_size: sequences in a step over all ranks.
            expert_ranks: ranks over which the experts of a mixture are spread.
            central_mask: which updates of central tensors are discarded.

        Raises:
            ConfigError: an unsupported combination, or groups that do not fit the model.
        """
        found = problems(config, world.size, "engine") + check_parameter_groups(model, optimizer)
        if found:
            raise ConfigError(found)
        self.world = world
        self.model = model
        self.num_updates = 0
        self._config = config
        self._seed = seed
        self._accumulation = accumulation
        self._clip_norm = clip_norm
        self._optimizer = optimizer
        self._experts = ExpertShards(model, expert_ranks, world)
        self._mask = CentralMask(central_mask, seed, optimizer.param_groups)
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._gate = StepGate(optimizer, self._mask, self._fragment)
        self.json = deepspeed_json(
            config,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            on_cuda=world.device.type == "cuda",
        )
        self._initialize()

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
        if len(microbatches) != self._accumulation:
            raise ParallelError(
                f"rank {self.world.rank}: {len(microbatches)} micro-batches in step {step}, but "
                f"the engine was built for {self._accumulation}"
            )
        targets = count_targets(microbatches, self.world)
        num_tokens = targets.num_tokens
        statistics = StatisticsSum(self.world.device)
        loss_sum = self._accumulate(microbatches, step, targets, statistics)
        squares = squares_by_role(self._own_gradients(), self.world.device)
        total, *by_role = self.world.all_reduce_sum(torch.cat([loss_sum, squares])).tolist()
        loss, norm = total / max(num_tokens, 1), total_norm(by_role)
        reason = skip_reason(loss, norm, num_tokens, guard)
        counted = statistics.over_ranks(self.world)
        set_learning_rate(self._optimizer, lr)
        clip = clip_coefficient(norm, self._clip_norm)
        # DeepSpeed always runs its whole step, which also clears its gradients; what is refused is
        # the one call in the middle that changes masters and moments.
        with self._gate.passing(reason is None, step=step, clip=clip):
            self._engine.step()
        if reason is None:
            self._mask.count_update(step)
            balance_routers(self.model, counted)
            self.num_updates += 1
        else:
            self._partition.drop_gradients()
        roles = (role_of(p) for p in self._parameters.values())
        return StepResult(
            loss=loss,
            grad_norm=norm,
            grad_norm_by_role=norms_by_role(by_role, roles) if detail else None,
            num_tokens=num_tokens,
            skipped=reason is not None,
            reason=reason,
            statistics=counted,
        )

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Return the loss over all ranks' batches; see `Engine.evaluate`."""

        def forward(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor] | None]:
            _, loss_sum, counted = self._engine(batch)
            return loss_sum, counted

        split = self._config.zero_stage == 3 or self._experts.degree > 1
        return evaluate_batches(
            self._engine.module,
            forward,
            batches,
            self.world,
            lockstep=split and self.world.size > 1,
        )

    def export_state(self) -> Iterator[StateTensor]:
        """Yield the training state parameter by parameter; see `Engine.export_state`."""
        yield from export_fragments(
            self._partition,
            self._optimizer,
            self._parameters,
            self._shapes,
            self.world,
            self.num_updates,
        )
        yield from export_buffers(self.model, self.world)

    def counters(self) -> dict[str, int]:
        """Return Adam's counters of central tensors that rest now and then."""
        return dict(self._mask.updates)

    def import_state(
        self, read: StateReader, num_updates: int, counters: Mapping[str, int] | None = None
    ) -> None:
        """Replace the training state; see `Engine.import_state`."""
        self._mask.load(counters, num_updates)
        import_fragments(
            self._partition,
            self._optimizer,
            self._parameters,
            self._shapes,
            read,
            num_updates,
            lambda group: self._mask.group_updates(group, num_updates),
        )
        import_buffers(self.model, read)
        self.num_updates = num_updates

    def full_parameters(self) -> AbstractContextManager[None]:
        """Make all weights whole inside the block; see `Engine.full_parameters`."""
        if self._config.zero_stage < 3:
            return self._experts.whole()
        return whole_parameters(self._deepspeed, self._engine, self.model)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; the world stays."""
        self._engine.destroy()
        self._gate.remove()
        self._experts.close()

    def _initialize(self) -> None:
        self._deepspeed = start_deepspeed(self.world)
        # DeepSpeed rounds the model to bf16 before it copies the masters: keep what is lost.
        rounded = self._config.dtype == "bf16"
        spread = {
            name: parameter
            for name, parameter in self._parameters.items()
            if self._experts.degree > 1 and experts_of(parameter)
        }
        exact = {name: host_copy(p) for name, p in spread.items() if rounded}
        # Other ranks' experts never reach the device.
        self._experts.cut()
        self._experts.mark(self._optimizer)
        self.model.to(self.world.device)
        for name, tensor in [*self._parameters.items(), *self.model.named_buffers()]:
            if name not in spread:
                self.world.broadcast(tensor.data)
                exact |= {name: host_copy(tensor)} if rounded else {}
        self._engine: Any = self._deepspeed.initialize(
            model=LossModule(
                self.model,
                bare_call=self._config.zero_stage == 3,
                marker=self._experts.marker(self._deepspeed),
            ),
            optimizer=self._optimizer,
            config=self.json,
            dist_init_required=False,
        )[0]
        self._experts.connect()
        self._partition = partition_of(
            self._engine, self._config.zero_stage, self.world, self._experts
        )
        if isinstance(self._optimizer, Layerwise):
            self._optimizer.use_layers(
                map_layers(
                    [flat for _, flat in self._partition.flats()],
                    self._parameters,
                    self._shapes,
                    self._fragment,
                    self.world,
                    shared=self._partition.shared,
                )
            )
        if exact:
            self.import_state(lambda name: {WEIGHT: exact[name]}, 0)

    def _accumulate(
        self,
        microbatches: Sequence[Batch],
        step: int,
        targets: Targets,
        statistics: StatisticsSum,
    ) -> Tensor:
        """Run all micro-batches; return this rank's summed loss, float64 (1,)."""
        self._engine.train()
        # DeepSpeed averages gradients over ranks; the product undoes it. Its division by the
        # number of micro-batches is switched off.
        scale = self.world.size / max(targets.num_tokens, 1)
        loss_sum = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        for slot, batch in enumerate(microbatches):
            last = slot == len(microbatches) - 1
            self._engine.set_gradient_accumulation_boundary(last)
            number = slot * self.world.size + self.world.rank
            torch.manual_seed(microbatch_seed(self._seed, step, number))
            objective, loss, counts = self._engine(targets.weigh(batch).to(self.world.device))
            loss_sum += loss
            statistics.add(counts)
            self._engine.backward(objective * scale, scale_wrt_gas=False)
        return loss_sum

    def _fragment(self, name: str) -> Fragment | None:
        return self._partition.fragment(self._parameters[name])

    def _own_gradients(self) -> Iterator[tuple[Role, Tensor]]:
        if self._config.offload_optimizer and self.world.device.type == "cuda":
            # Gradients travel to host memory on streams of their own.
            torch.cuda.synchronize()
        for parameter in self._parameters.values():
            gradient = self._partition.gradient(parameter)
            if gradient is not None:
                yield role_of(parameter), gradient
