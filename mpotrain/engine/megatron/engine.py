"""The Megatron engine: one optimizer step over a grid of tensor, pipeline and expert ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
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
from mpotrain.engine.config import NO_MASK, CentralMaskConfig
from mpotrain.engine.fragment import Fragment
from mpotrain.engine.gradients import (
    check_parameter_groups,
    norms_by_role,
    set_learning_rate,
    squares_by_role,
    total_norm,
)
from mpotrain.engine.layerwise import Layerwise
from mpotrain.engine.megatron import cpu
from mpotrain.engine.megatron.chunks import build_chunks
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.fixes import repair_modules
from mpotrain.engine.megatron.forward_only import evaluate_batches
from mpotrain.engine.megatron.groups import Groups
from mpotrain.engine.megatron.layer_norms import CutLayers
from mpotrain.engine.megatron.masters import Master, Optimizers, mark_for_core
from mpotrain.engine.megatron.pipeline import Pipeline
from mpotrain.engine.megatron.placement import placement_of
from mpotrain.engine.megatron.reductions import Reductions
from mpotrain.engine.megatron.routing import LogicalRouter
from mpotrain.engine.megatron.start import start_megatron, stop_megatron
from mpotrain.engine.megatron.telling import Collector
from mpotrain.engine.megatron.transfer import Transfer
from mpotrain.engine.statistics import balance_routers, export_buffers, import_buffers
from mpotrain.engine.step_gate import StepGate, clip_coefficient
from mpotrain.engine.targets import count_targets
from mpotrain.errors import ConfigError
from mpotrain.models.config import AnyModel
from mpotrain.nn.roles import role_of
from mpotrain.parallel.grid import rank_grid
from mpotrain.parallel.ranks import World

LAMB_SPLIT = (
    "engine.distributed_optimizer: megatron-core's distributed optimizer splits parameters over "
    "ranks without regard to layers and knows Adam alone; for LAMB set it to false"
)


ELEMENTS_OF_COPIES = (
    "train.central_mask.granularity: a rank holds several copies of a shared central tensor "
    '(parallel.virtual_pipeline), whose elements would rest apart; use "tensor"'
)
_OF_CORE = (
    r"`torch\.distributed\.(reduce_scatter|all_gather)\w*` is deprecated",
    r"(Transformer Engine and Apex are|Apex is) not installed",
    r"The \.grad attribute of a Tensor that is not a leaf",
)
"""Warnings about megatron-core's own code."""


class MegatronEngine:
    """A network cut over ranks by megatron-core, behind the seam of `Engine`.

    The network is built from its configuration; the model that is handed over gives the start
    weights and keeps names, shapes, roles and buffers. Its weights are let go, and come back for
    as long as `full_parameters` is open.

    Attributes:
        world: all ranks.
        model: the bare model.
        num_updates: updates applied so far.
        chunks: what this rank holds of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        network: AnyModel,
        config: MegatronConfig,
        world: World,
        seed: int,
        clip_norm: float | None,
        central_mask: CentralMaskConfig = NO_MASK,
    ) -> None:
        """Cut a model and its optimizer over the ranks (collective).

        Args:
            model: the whole network in fp32, the same on all ranks.
            optimizer: AdamW or LAMB over its parameters; groups carry "lr_factor".
            network: the section that the model was built from.
            config: the engine section.
            world: an initialised world with a process group and the degrees of the run.
            seed: seed of the run, for dropout.
            clip_norm: largest gradient norm that is let through; None = no clipping.
            central_mask: which updates of central tensors are discarded.

        Raises:
            ConfigError: groups that do not fit the model, or degrees that do not fit the world.
        """
        found = check_parameter_groups(model, optimizer)
        if rank_grid(world.parallel, world.size) is None:
            found.append(
                f"parallel: tp x cp x pp = {world.parallel.model_ranks} and ep x etp x pp do not "
                f"divide the world of {world.size}"
            )
        if config.distributed_optimizer and isinstance(optimizer, Layerwise):
            found.append(LAMB_SPLIT)
        if found:
            raise ConfigError(found)
        self.world, self.model, self.num_updates = world, model, 0
        for message in _OF_CORE:
            warnings.filterwarnings("ignore", message=message)
        self._config, self._clip_norm = config, clip_norm
        with ExitStack() as opened:
            cpu.install()
            opened.callback(cpu.uninstall)
            repair_modules()
            start_megatron(world.parallel, seed % (1 << 31))
            opened.callback(stop_megatron)
            self._build(optimizer, network, seed, central_mask)
            # Where building fails nothing of it stays; else it is for `close` to end, once.
            self._closing = opened.pop_all()

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
        for chunk in self._ddp:
            chunk.train()
        self._optimizers.zero_gradients()
        targets = count_targets(microbatches, self._data_world)
        telling = self._pipeline.train(microbatches, targets, step)
        loss_sum, statistics = self._collector.collect(telling, "train")
        self._optimizers.prepare_gradients()
        own = ((m.placement.role, m.gradient) for m in self._optimizers.masters if self._counts(m))
        summed = self.world.all_reduce_sum(squares_by_role(own, self.world.device))
        squares = summed.tolist()
        loss, norm = loss_sum / max(targets.num_tokens, 1), total_norm(squares)
        reason = skip_reason(loss, norm, targets.num_tokens, guard)
        if reason is None:
            self._update(lr, step, clip_coefficient(norm, self._clip_norm))
            balance_routers(self.model, statistics)
            self._spread_buffers()
        roles = (role_of(p) for p in self.model.parameters())
        return StepResult(
            loss=loss,
            grad_norm=norm,
            grad_norm_by_role=norms_by_role(squares, roles) if detail else None,
            num_tokens=targets.num_tokens,
            skipped=reason is not None,
            reason=reason,
            statistics=statistics,
        )

    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Return the loss over all ranks' batches; see `Engine.evaluate`."""
        with self._gathered():
            return evaluate_batches(
                self._ddp, self._pipeline, self._collector, batches, self._data_world
            )

    def export_state(self) -> Iterator[StateTensor]:
        """Yield the training state tensor by tensor; see `Engine.export_state`."""
        yield from self._transfer.export(self.num_updates)
        yield from export_buffers(self.model, self.world)

    def counters(self) -> dict[str, int]:
        """Return Adam's counters of central tensors that rest now and then."""
        return dict(self._mask.updates)

    def import_state(
        self, read: StateReader, num_updates: int, counters: Mapping[str, int] | None = None
    ) -> None:
        """Replace the training state; see `Engine.import_state`."""
        self._mask.load(counters, num_updates)
        self._transfer.load(
            read, num_updates, lambda group: self._mask.group_updates(group, num_updates)
        )
        import_buffers(self.model, read)
        self._spread_buffers()
        self.num_updates = num_updates

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Make `model` an ordinary module for the length of a block; see `Engine`."""
        parameters = dict(self.model.named_parameters())
        for name, whole in self._transfer.weights():
            parameters[name].data = whole
        try:
            yield
        finally:
            self._let_go()

    def close(self) -> None:
        """Give the optimizers their own steps back, and end megatron-core's groups; once."""
        for gate in self._gates:
            gate.remove()
        self._closing.close()

    def _build(
        self,
        optimizer: torch.optim.Optimizer,
        network: AnyModel,
        seed: int,
        central_mask: CentralMaskConfig,
    ) -> None:
        """Build this rank's part of everything, with the start weights of the model."""
        self._groups = Groups.current()
        self._data_world = World(
            self._groups.data.rank(),
            self._groups.data.size(),
            self.world.local_rank,
            self.world.device,
            self.world.backend,
            group=self._groups.data,
        )
        built = build_chunks(network, self._config, self.world.parallel, self.world.device)
        self._first_place, self._places = built.first_place, built.places
        self.chunks = built.modules
        self._ddp = self._wrap(built.config)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._optimizers = Optimizers(optimizer, names, self._ddp, self._config)
        copies = [p.name for c in self.chunks for p in map(placement_of, c.parameters())]
        masks_elements = central_mask.probability > 0 and central_mask.granularity == "element"
        if masks_elements and len(copies) > len(set(copies)):
            raise ConfigError([ELEMENTS_OF_COPIES])
        self._mask = CentralMask(central_mask, seed, optimizer.param_groups)
        self._gates = [
            StepGate(inner, self._mask, self._fragment) for inner in self._optimizers.inner
        ]
        for inner in self._optimizers.inner:
            if isinstance(inner, Layerwise):
                inner.use_layers(CutLayers(self._optimizers.masters, self._groups))
        self._transfer = Transfer(
            {n: (tuple(p.shape), role_of(p)) for n, p in self.model.named_parameters()},
            self.chunks,
            self._optimizers.masters,
            self._counts,
            self.world,
        )
        self._pipeline = Pipeline(self._ddp, self.world, self._groups, seed, built.cache)
        self._collector = Collector(self.world, self._groups, network.mixtures())
        self._load_start()

    def _wrap(self, config: Any) -> list[DistributedDataParallel]:
        """Wrap the chunks for data parallelism and tell the schedule how to reduce."""
        split = self._config.distributed_optimizer
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=split,
            overlap_grad_reduce=self._config.overlap_grad_reduce,
            overlap_param_gather=self._config.overlap_param_gather,
            bucket_size=self._config.bucket_elements,
        )
        for chunk in self.chunks:
            mark_for_core(chunk, is_split=split)
        wrapped = [
            DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(self.chunks)
        ]

        def each(name: str) -> Any:
            found = [getattr(chunk, name) for chunk in wrapped]
            return found if len(found) > 1 else found[0]

        config.finalize_model_grads_func = Reductions(self.chunks, self._groups, self.world)
        config.no_sync_func = each("no_sync")
        if self._config.overlap_grad_reduce:
            config.grad_sync_func = each("start_grad_sync")
            if self._config.overlap_param_gather:
                config.param_sync_func = each("start_param_sync")
        return wrapped

    def _load_start(self) -> None:
        """Take the start weights over from the model, and let its own copies go."""
        parameters = dict(self.model.named_parameters())

        def read(name: str) -> dict[str, Tensor]:
            return {WEIGHT: parameters[name].detach().float().cpu()}

        self._transfer.load(read, 0, lambda group: 0)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.world.device)
        self._spread_buffers()
        self._let_go()

    def _let_go(self) -> None:
        """Leave the model's parameters their shapes and marks, and no memory."""
        for parameter in self.model.parameters():
            parameter.data = torch.zeros((), device=self.world.device).expand(parameter.shape)

    def _update(self, lr: float, step: int, clip: float) -> None:
        for inner in self._optimizers.inner:
            set_learning_rate(inner, lr)
        for gate in self._gates:
            gate.set(step=step, clip=clip)
        self._optimizers.update()
        self._mask.count_update(step)
        self.num_updates += 1

    def _spread_buffers(self) -> None:
        """Bring the buffers of the model (selection biases of routers) to the chunks."""
        buffers = dict(self.model.named_buffers())
        for chunk in self.chunks:
            for module in chunk.modules():
                if isinstance(module, LogicalRouter) and module.balance is not None:
                    module.balance.copy_(buffers[f"{module.name}.router.balance"])

    def _counts(self, master: Master) -> bool:
        """Return whether of all copies of some elements these stand for all."""
        name = master.placement.name
        place = self._places[master.chunk]
        is_first = self._first_place.get(name, place) == place
        return is_first and self._groups.holds_first_copy(
            master.placement, is_split=self._config.distributed_optimizer
        )

    def _fragment(self, name: str) -> Fragment | None:
        """Return this rank's elements of a logical tensor."""
        for master in self._optimizers.masters:
            if master.placement.name == name:
                return master.fragment()
        return None

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Gather all weights first where they are otherwise gathered during forward passes."""
        if not self._config.overlap_param_gather:
            yield
            return
        for chunk in self._ddp:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in self._ddp:
                chunk.enable_forward_pre_hook()
