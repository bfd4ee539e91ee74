"""Runs micro-batches through the pipeline on megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from mpotrain.batch import Batch
from mpotrain.engine.megatron.groups import Groups
from mpotrain.engine.megatron.micro import Micro, Tally
from mpotrain.engine.megatron.telling import Telling
from mpotrain.engine.targets import Targets
from mpotrain.parallel.ranks import World
from mpotrain.parallel.seeds import microbatch_seed
from mpotrain.tensor.cached import StepCache

_PLACES = 0x706C616365000000
"""Keeps the random streams of stages and context ranks apart from those of other counters."""


class Pipeline:
    """Forward and backward passes of a step over all stages.

    Stages with one chunk alternate forward and backward passes (1F1B), stages with several
    interleave them (Narayanan et al. 2021, arXiv 2104.04473).
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        world: World,
        groups: Groups,
        seed: int,
        cache: StepCache | None,
    ) -> None:
        """Prepare.

        Args:
            chunks: of this rank, wrapped for data parallelism.
            world: all ranks.
            groups: of this rank.
            seed: of the run.
            cache: of rebuilt matrices; None without.
        """
        self._chunks, self._world, self._groups = list(chunks), world, groups
        self._seed, self._cache = seed, cache

    def train(self, batches: Sequence[Batch], targets: Targets, step: int) -> Telling:
        """Run forward and backward passes and reduce the gradients (collective).

        Args:
            batches: this rank's micro-batches.
            targets: counts over the global batch.
            step: number of the step.
        """
        weighed = [targets.weigh(batch) for batch in batches]
        return self._run(weighed, [True] * len(batches), max(targets.num_tokens, 1), step)

    def evaluate(self, batches: Sequence[Batch], counts: Sequence[bool]) -> Telling:
        """Run forward passes alone (collective).

        Args:
            batches: micro-batches of one shape.
            counts: which of them are told of.
        """
        return self._run(batches, counts, 1, None)

    def _run(
        self, batches: Sequence[Batch], counts: Sequence[bool], num_tokens: int, step: int | None
    ) -> Telling:
        telling = Telling()
        stage = self._groups.pipeline.rank()

        def forward_step(iterator: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Any]:
            slot, batch = next(iterator)
            micro = Micro(
                slot=slot,
                is_last=slot == len(batches) - 1,
                loss_scale=1.0 / num_tokens,
                auxiliary_scale=batch.num_tokens / num_tokens,
                tally=Tally(),
            )
            if step is not None:
                self._set_random_state(step, slot, stage, self._number(chunk))
            output = chunk(batch, micro)
            micro.tally.is_open = False
            if counts[slot]:
                telling.add(micro.tally)

            def loss_of(objective: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                count = torch.tensor(batch.num_tokens, dtype=torch.int, device=objective.device)
                return objective * micro.loss_scale, count, {}

            return output, loss_of

        moved = [batch.to(self._world.device) for batch in batches]
        iterators = [iter(enumerate(moved)) for _ in self._chunks]
        caches = self._cache is not None and step is not None
        with self._cache.step(len(batches)) if caches else nullcontext():  # type: ignore[union-attr]
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=len(batches),
                seq_length=batches[0].inputs.shape[1],
                micro_batch_size=batches[0].inputs.shape[0],
                forward_only=step is None,
            )
        return telling

    def _number(self, chunk: Any) -> int:
        return next(n for n, own in enumerate(self._chunks) if own is chunk)

    def _set_random_state(self, step: int, slot: int, stage: int, number: int) -> None:
        """Seed dropout: tensor-parallel ranks share one stream and have one of their own each."""
        microbatch = slot * self._world.data_size + self._world.data_rank
        place = (number * self._groups.pipeline.size() + stage) * self._groups.context.size()
        place += self._groups.context.rank()
        seed = microbatch_seed(self._seed, step, microbatch)
        if place:
            seed = microbatch_seed(seed ^ _PLACES, place, 0)
        # Generators on the CPU read 32 bits; megatron-core derives others by adding to the seed.
        seed %= 1 << 31
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)


def batches_at_a_time(num_chunks: int) -> int:
    """Return how many batches an evaluation sends through the pipeline together.

    Args:
        num_chunks: chunks of this rank.

    Returns:
        A multiple of the stages (which the interleaved schedule asks for) that keeps them busy.
    """
    stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    return 1 if stages == 1 else stages * (2 if num_chunks == 1 else 4)
