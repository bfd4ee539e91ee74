"""What each stage of the pipeline works on and holds: the base of plans (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.copies import chunk_layers
from mpotrain.engine.megatron.holdings import (
    Holder,
    Holding,
    Place,
    copied_names,
    held_names,
)
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.sites import Site
from mpotrain.models.t5_config import T5Config
from mpotrain.parallel.grid import RankGrid, rank_grid
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.sample import SampleLengths
from mpotrain.tensor.device import BYTES


@dataclass(frozen=True)
class Work:
    """A run as its stages see it; none of it has problems.

    Attributes:
        model: the network.
        engine: the engine section.
        parallel: the degrees.
        lengths: rows of a sample.
        micro_batch_size: sequences of a micro-batch.
        accumulation: micro-batches of a step on each data-parallel rank.
        world_size: ranks.
    """

    model: AnyModel
    engine: MegatronConfig
    parallel: ParallelConfig
    lengths: SampleLengths
    micro_batch_size: int
    accumulation: int
    world_size: int

    @property
    def grid(self) -> RankGrid:
        """Sizes of all axes."""
        grid = rank_grid(self.parallel, self.world_size)
        assert grid is not None, "the degrees do not divide the world"
        return grid

    @property
    def width(self) -> int:
        """Bytes of an activation, and of a weight."""
        return BYTES[self.engine.dtype]

    @property
    def splits_positions(self) -> bool:
        """Whether tensor-parallel ranks share positions between matrices."""
        return self.parallel.sequence and self.parallel.tensor > 1

    @property
    def stream_parts(self) -> int:
        """Tensor-parallel ranks among which the residual stream is split."""
        return self.parallel.tensor if self.splits_positions else 1

    def tokens(self, rows: int) -> int:
        """Return the tokens of a micro-batch that a context-parallel rank works on.

        Args:
            rows: of a sample.
        """
        return self.micro_batch_size * rows // self.parallel.context


@dataclass(frozen=True)
class Stage:
    """What the ranks of one stage hold and compute.

    Attributes:
        number: of the stage, from 0.
        chunks: layers of each of its chunks; all blocks of both stacks where the network is not
            cut into stages.
        holdings: what a rank holds; a tensor of which two chunks of the stage have a copy is
            there twice.
        copied: names of those of which other stages hold a copy as well.
        num_stages: stages of the pipeline.
    """

    number: int
    chunks: tuple[range, ...]
    holdings: tuple[Holding, ...]
    copied: frozenset[str]
    num_stages: int

    @property
    def is_first(self) -> bool:
        """Whether tokens are embedded here."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.number == self.num_stages - 1

    @property
    def layers(self) -> list[int]:
        """All its layers, in the order of the network."""
        return [layer for chunk in self.chunks for layer in chunk]

    @property
    def num_elements(self) -> int:
        """Elements of all parameters that a rank holds."""
        return sum(holding.size for holding in self.holdings)


class Stages:
    """The stages of a run.

    Attributes:
        work: the run.
        holder: tells what a rank holds of each tensor.
        stages: in the order of the pipeline.
        held_by: stages that hold a tensor, by its name.
        sizes: elements of each tensor on a rank, by its name.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.holder = Holder(work.model, work.parallel)
        holdings, held = self.holder.holdings(), held_names(work.model, work.parallel)
        self.sizes = {name: holding.size for name, holding in holdings.items()}
        self.held_by: dict[str, list[int]] = {}
        for (stage, _), names in held.items():
            for name in names:
                self.held_by[name] = sorted({*self.held_by.get(name, ()), stage})
        copied = copied_names(held)
        self.stages = [
            self._stage(number, held, holdings, copied) for number in range(work.parallel.pipeline)
        ]

    def _stage(
        self,
        number: int,
        held: dict[Place, set[str]],
        holdings: dict[str, Holding],
        copied: frozenset[str],
    ) -> Stage:
        parallel, model = self.work.parallel, self.work.model
        own = [names for (stage, _), names in held.items() if stage == number]
        chunks: tuple[range, ...] = (range(0),)
        if not isinstance(model, T5Config):
            cut = chunk_layers(model.num_layers, parallel.pipeline, parallel.virtual_pipeline)
            chunks = tuple(layers for (stage, _), layers in cut.items() if stage == number)
        return Stage(
            number,
            chunks,
            tuple(holdings[name] for names in own for name in sorted(names)),
            copied.intersection(*[set[str]().union(*own)]),
            parallel.pipeline,
        )

    def sites(self, stage: Stage) -> Iterator[Site]:
        """Yield the matrices that a forward pass of a stage multiplies by inside of blocks.

        A matrix comes as often as layers use it.

        Args:
            stage: one of `stages`.
        """
        model = self.work.model
        sites = [site for site in model.all_sites() if "blocks." in site.name]
        if isinstance(model, T5Config):
            yield from sites
            return
        for layer in stage.layers:
            block = model.block(layer) if isinstance(model, EncoderConfig) else layer
            yield from (site for site in sites if site.name.startswith(f"blocks.{block}."))
