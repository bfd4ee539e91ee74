"""How a global batch is cut into micro-batches over accumulation and ranks (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mpotrain.errors import ParallelError
from mpotrain.schema import collect_problems, config

DEGREES = ("expert", "tensor", "pipeline", "virtual_pipeline", "context", "expert_tensor")
"""Fields of `ParallelConfig` that count ranks or chunks."""


@config
class ParallelConfig:
    """Parallel degrees. They stand in the run file; the world that was started is checked."""

    data: int | None = None
    """Expected number of data-parallel ranks; absent = whatever was started, if it divides."""
    expert: int = 1
    """Ranks over which the experts of a mixture are spread; divides the world and the experts.
    1 = every rank holds all experts and no token travels."""
    tensor: int = 1
    """Ranks that share every matrix: each computes some of its features (tp, Megatron engine)."""
    sequence: bool = False
    """Split norms and residual streams over the tensor-parallel ranks, by positions (sp)."""
    pipeline: int = 1
    """Stages of layers, one behind the other (pp, Megatron engine)."""
    virtual_pipeline: int = 1
    """Chunks of layers on each stage, which a micro-batch meets in turn (vp); 1 = one chunk."""
    context: int = 1
    """Ranks that share every sequence, by positions, in all layers (cp, Megatron engine)."""
    expert_tensor: int = 1
    """Ranks that share every expert's matrices (etp, Megatron engine)."""

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the degrees themselves, one line each.

        Args:
            where: dotted key of this section.
        """
        return collect_problems(
            *(partial(self._degree_problems, where, key) for key in ("data", *DEGREES))
        )

    def _degree_problems(self, where: str, key: str) -> list[str]:
        ranks = getattr(self, key)
        if ranks is None or ranks >= 1:
            return []
        instead = ", or leave it out" if key == "data" else ""
        return [f"{where}.{key}: {ranks} ranks; give at least 1{instead}"]

    @property
    def model_ranks(self) -> int:
        """Ranks that together compute one micro-batch: tp x cp x pp."""
        return self.tensor * self.context * self.pipeline

    def data_ranks(self, world_size: int) -> int:
        """Return the data-parallel ranks of a world, at least 1; each meets its own samples."""
        return max(1, world_size // max(1, self.model_ranks))


@dataclass(frozen=True)
class BatchLayout:
    """Cut of one step's global batch.

    Micro-batch m (0 <= m < num_microbatches) holds samples [m * micro, (m + 1) * micro) of the
    step; data-parallel rank r computes micro-batch m = a * world_size + r in its slot a.

    Attributes:
        global_batch_size: sequences in an optimizer step, over all ranks.
        micro_batch_size: sequences in one forward pass of one rank.
        world_size: data-parallel ranks.
        num_microbatches: micro-batches in a step, over all ranks.
        accumulation: micro-batches in a step on each rank.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    num_microbatches: int
    accumulation: int

    def microbatch(self, slot: int, rank: int) -> int:
        """Return the number inside the step of the micro-batch of `rank` in slot `slot`."""
        return slot * self.world_size + rank


def batch_layout(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchLayout:
    """Cut a global batch evenly.

    Args:
        global_batch_size: sequences in an optimizer step.
        micro_batch_size: sequences in one forward pass of one rank.
        world_size: data-parallel ranks.

    Returns:
        The layout; every rank gets the same number of full micro-batches.

    Raises:
        ParallelError: sizes below 1, or sizes that do not divide; with the nearest valid choices.
    """
    found = _division_problems(global_batch_size, micro_batch_size, world_size)
    if found:
        raise ParallelError("\n".join(found))
    num_microbatches = global_batch_size // micro_batch_size
    return BatchLayout(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        num_microbatches=num_microbatches,
        accumulation=num_microbatches // world_size,
    )


def batch_problems(
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    parallel: ParallelConfig | None = None,
) -> list[str]:
    """Return why the world that was started cannot run these batch sizes.

    Args:
        global_batch_size: sequences in an optimizer step.
        micro_batch_size: sequences in one forward pass of one rank.
        world_size: number of processes that were started.
        parallel: how many of them work on one micro-batch (the others are data-parallel), and
            the expected number of data-parallel ranks.

    Returns:
        One line for each problem, beginning with its dotted key; empty when all fits.
    """
    together = 1 if parallel is None else max(1, parallel.model_ranks)
    if world_size % together:
        return []  # the engine says which degree does not divide the world
    ranks, found = world_size // together, []
    expected = None if parallel is None else parallel.data
    if expected is not None and expected != ranks:
        data = "" if together == 1 else f"{ranks} data-parallel ranks in "
        found.append(
            f"parallel.data: {expected} ranks are expected, but the world has {data}{world_size}; "
            f"start {expected * together} processes, or change parallel.data to {ranks}"
        )
    kind = "ranks" if together == 1 else "data-parallel ranks"
    rounds = parallel.pipeline if parallel is not None and parallel.virtual_pipeline > 1 else 1
    return found + _division_problems(global_batch_size, micro_batch_size, ranks, kind, rounds)


def _division_problems(
    global_size: int, micro: int, world: int, kind: str = "ranks", rounds: int = 1
) -> list[str]:
    """Return why a batch cannot be cut, with choices that can.

    Args:
        global_size: sequences of a step.
        micro: sequences of a micro-batch.
        world: ranks that meet different samples.
        kind: what to call them.
        rounds: the micro-batches of a rank are to be a multiple of it.
    """
    found = [
        f"{key}: {value}; it must be at least 1"
        for key, value in (
            ("train.global_batch_size", global_size),
            ("train.micro_batch_size", micro),
            ("parallel.data", world),
        )
        if value < 1
    ]
    if found or global_size % (micro * world) == 0:
        return found
    sizes = _multiples(global_size, micro * world * rounds)
    choices = [f"train.global_batch_size={_either(sizes)}"]
    if global_size % (world * rounds) == 0:
        micros = _divisors_near(global_size // world // rounds, micro)
        choices.append(f"train.micro_batch_size={_either(micros)}")
    if global_size % (micro * rounds) == 0:
        choices.append(f"{_either(_divisors_near(global_size // micro // rounds, world))} {kind}")
    return [
        f"train.global_batch_size: {global_size} sequences cannot be cut into micro-batches of "
        f"{micro} on {world} {kind} ({global_size} is no multiple of {micro} x {world} = "
        f"{micro * world}); nearest valid choices: {', or '.join(choices)}"
    ]


def _multiples(value: int, unit: int) -> list[int]:
    below = value // unit * unit
    return [choice for choice in (below, below + unit) if choice > 0]


def _divisors_near(value: int, wanted: int) -> list[int]:
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in divisors if d <= wanted]
    above = [d for d in divisors if d > wanted]
    return [*below[-1:], *above[:1]]


def _either(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
