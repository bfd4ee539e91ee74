"""What a pre-flight measures, as plain data that travels as JSON (no torch, no judgement)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class GpuFacts:
    """One GPU.

    Attributes:
        uuid: identity, the same for all processes of the node.
        name: model.
        total_gib: memory.
        free_gib: memory that nobody holds.
        tflops: speed of bf16 matrix products, 10^12 operations per second; None if it failed.
        error: why it is not fit for work; None if it is.
    """

    uuid: str
    name: str
    total_gib: float
    free_gib: float
    tflops: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class DiskFacts:
    """One folder on one node.

    Attributes:
        purpose: "run folder" or "temporary folder".
        path: where it is.
        free_gib: space; None if it could not be found out.
        write_mib_per_s: speed of writing and fsync; None if it could not be measured.
        error: what went wrong; None if nothing did.
    """

    purpose: str
    path: str
    free_gib: float | None = None
    write_mib_per_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class ClockFacts:
    """The clock of a node.

    Attributes:
        ahead: seconds by which it is ahead of that of the first node.
        uncertainty: seconds by which `ahead` may be wrong (half of the round trip).
    """

    ahead: float
    uncertainty: float


@dataclass(frozen=True)
class RankFacts:
    """What one rank found on its node without the others.

    Attributes:
        rank: number of the rank.
        device: uuid of the GPU it would train on; None on a CPU.
        gpus: the GPUs that it tested: every one of the node is tested by one rank.
        disks: measured by the first rank of the node alone.
        versions: likewise; None where a version cannot be known.
        errors: other things that went wrong, in full sentences.
    """

    rank: int
    device: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    disks: tuple[DiskFacts, ...] = ()
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeFacts:
    """All that is known of a node.

    Attributes:
        number: of the node, counted from 0.
        name: as the scheduler or the host calls it.
        num_ranks: how many ranks it should run.
        met: how many of them reached the first rank.
        ranks: what those found that answered.
        clock: None if it was not compared.
        unreachable: what the node itself wrote into the folder of reports when it could not reach
            the first rank: it lives, its network does not; None where it wrote nothing.
        broken: what it wrote there when it could not even look for the first rank, or hung.
        silent: the stage in which it stopped answering; None if it answered to the end.
        seen: whether its report is found in the folder of reports by the first rank; None if
            nobody looked.
    """

    number: int
    name: str
    num_ranks: int = 1
    met: int = 1
    ranks: tuple[RankFacts, ...] = ()
    clock: ClockFacts | None = None
    unreachable: str | None = None
    broken: str | None = None
    silent: str | None = None
    seen: bool | None = None

    @property
    def gpus(self) -> tuple[GpuFacts, ...]:
        """All GPUs of the node, each once."""
        return tuple({gpu.uuid: gpu for rank in self.ranks for gpu in rank.gpus}.values())

    @property
    def disks(self) -> tuple[DiskFacts, ...]:
        """The folders measured on the node."""
        return tuple(disk for rank in self.ranks for disk in rank.disks)

    @property
    def versions(self) -> dict[str, str | None]:
        """Versions of the software on the node."""
        return next((rank.versions for rank in self.ranks if rank.versions), {})

    @property
    def can_compute(self) -> bool:
        """Whether it makes sense to ask the node for collectives."""
        whole = self.silent is None and self.met >= self.num_ranks
        return whole and all(gpu.error is None for gpu in self.gpus)


@dataclass(frozen=True)
class GroupFacts:
    """One all-reduce among all ranks of some nodes.

    Attributes:
        nodes: numbers of the nodes.
        gib_per_s: bus bandwidth: bytes of a rank / seconds x 2 (n - 1) / n for n ranks; None if
            it failed.
        error: what went wrong; None if the sum was right.
    """

    nodes: tuple[int, ...]
    gib_per_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class WorldFacts:
    """Everything that a pre-flight measured.

    Attributes:
        nodes: all expected nodes in the order of their numbers.
        inside: one all-reduce in every node that has several ranks.
        pairs: one for each pair of nodes that was tried.
        whole: one over all nodes that seemed good; None if there was no need.
    """

    nodes: tuple[NodeFacts, ...]
    inside: tuple[GroupFacts, ...] = ()
    pairs: tuple[GroupFacts, ...] = ()
    whole: GroupFacts | None = None


_RANK_FACTS = TypeAdapter(RankFacts)


def plain(facts: Any) -> Any:
    """Return facts as JSON types.

    Args:
        facts: an instance of one of the classes above.
    """
    return json.loads(json.dumps(dataclasses.asdict(facts)))


def rank_facts(data: Any) -> RankFacts:
    """Return what another rank sent.

    Args:
        data: what `plain` gave there.
    """
    return _RANK_FACTS.validate_python(data)
