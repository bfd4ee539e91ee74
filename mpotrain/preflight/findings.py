"""What is wrong with nodes, one kind of measurement at a time (no torch, no I/O).

Every function turns measurements into findings; each finding says what was seen and what to do.
Where nodes contradict each other and a majority is in the right, the minority is named with
certainty; where there is no majority (two nodes, say), all of them are named as suspects.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mpotrain.preflight.facts import DiskFacts, GpuFacts, NodeFacts
from mpotrain.preflight.options import PreflightOptions


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        node: number of the node; None where it belongs to none.
        text: what was seen, and what to do.
        certain: whether it is this node, or only one of several that it may be.
    """

    node: int | None
    text: str
    certain: bool = True


def answer_findings(nodes: Sequence[NodeFacts], options: PreflightOptions) -> Iterator[Finding]:
    """Find nodes that did not answer, or not with all of their ranks.

    Args:
        nodes: all nodes; the first one is where all others report.
        options: for the times that a text names.
    """
    first = nodes[0]
    cut_off = [node for node in nodes if node.unreachable and not (node.broken or node.met)]
    others_met = any(node.met for node in nodes[1:])
    limit = f"{options.meeting_seconds:.0f} s"
    for node in nodes:
        if node.met >= node.num_ranks:
            if node.silent is not None:
                yield Finding(
                    node.number,
                    f"stopped answering during: {node.silent}; it hangs or died: look at its log, "
                    "and exclude it",
                )
        elif node.met:
            yield Finding(
                node.number,
                f"only {node.met} of its {node.num_ranks} ranks answered within {limit}: the "
                "others did not start or died; look at their logs",
            )
        elif node.broken:
            yield Finding(node.number, f"{node.broken}; exclude it")
        elif not node.unreachable:
            yield Finding(
                node.number,
                f"did not answer within {limit}: it is down, or the command did not start on it; "
                "look at the log of the step, and exclude it",
            )
        elif first.met:
            yield from _cut_off(node, first, cut_off, others_met)


def _cut_off(
    node: NodeFacts, first: NodeFacts, cut_off: list[NodeFacts], others_met: bool
) -> Iterator[Finding]:
    if others_met:
        yield Finding(node.number, f"{node.unreachable}; other nodes could: exclude it")
        return
    # Nobody reached the first node. Several witnesses speak against it, a single one does not.
    if len(cut_off) == 1:
        yield Finding(node.number, f"{node.unreachable}; it or {first.name} is cut off", False)
    if node is cut_off[0]:
        names = ", ".join(other.name for other in cut_off)
        yield Finding(
            first.number,
            f"could not be reached by any other node, though they run ({names}); check its "
            "network, and that MASTER_ADDR is its address in the network of the nodes",
            False,
        )


def error_findings(node: NodeFacts) -> Iterator[Finding]:
    """Find what a node said of itself, and reports that do not reach the shared folder."""
    for rank in node.ranks:
        for text in rank.errors:
            yield Finding(node.number, text)


def shared_findings(nodes: Sequence[NodeFacts], options: PreflightOptions) -> Iterator[Finding]:
    """Find nodes whose folder of reports is not that of the first node."""
    looked = [node for node in nodes[1:] if node.seen is not None]
    unseen = [node for node in looked if not node.seen]
    advice = f"mount the same file system at {options.out} everywhere"
    if len(looked) > 1 and len(unseen) == len(looked):
        yield Finding(
            nodes[0].number,
            f"sees none of the reports that the other nodes wrote into {options.out}: {advice}",
        )
        return
    for node in unseen:
        yield Finding(
            node.number,
            f"wrote its report into {options.out}, but {nodes[0].name} does not see it there: "
            f"{advice}",
            len(looked) > 1,
        )


def gpu_findings(nodes: Sequence[NodeFacts], options: PreflightOptions) -> Iterator[Finding]:
    """Find missing, full and broken GPUs."""
    nodes = [node for node in nodes if node.ranks]
    counts = {node.number: len(node.gpus) for node in nodes}
    if options.expect_gpus is not None:
        for number, count in counts.items():
            if count != options.expect_gpus:
                yield Finding(
                    number,
                    f"has {count} GPU(s), expected {options.expect_gpus}: look at nvidia-smi "
                    "there and at what the job was given",
                )
    else:
        for number, text, certain in _odd_ones_out(counts):
            yield Finding(number, f"GPUs: {text}; look at nvidia-smi there", certain)
    for node in nodes:
        used = Counter(rank.device for rank in node.ranks if rank.device is not None)
        for uuid, num_ranks in used.items():
            if num_ranks > 1:
                yield Finding(
                    node.number,
                    f"{num_ranks} ranks share GPU {uuid}: start one rank for each GPU",
                )
        for gpu in node.gpus:
            yield from _one_gpu(node.number, gpu, options)


def _one_gpu(number: int, gpu: GpuFacts, options: PreflightOptions) -> Iterator[Finding]:
    what = f"GPU {gpu.uuid} ({gpu.name})"
    if gpu.error is not None:
        yield Finding(number, f"{what} is broken: {gpu.error}; exclude the node, have it repaired")
    if gpu.free_gib < options.min_gpu_gib:
        yield Finding(
            number,
            f"{what} has {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free, "
            f"{options.min_gpu_gib:g} are needed: end what holds its memory (nvidia-smi), or take "
            "larger GPUs",
        )


def disk_findings(node: NodeFacts, options: PreflightOptions) -> Iterator[Finding]:
    """Find full, slow and broken disks."""
    for disk in node.disks:
        where = f"{disk.purpose} {disk.path}"
        if disk.error is not None:
            yield Finding(node.number, f"{where}: {disk.error}; make room or mend it")
        if disk.purpose == "run folder":
            yield from _run_folder(node.number, where, disk, options)


def _run_folder(
    number: int, where: str, disk: DiskFacts, options: PreflightOptions
) -> Iterator[Finding]:
    if disk.free_gib is not None and disk.free_gib < options.min_free_gib:
        yield Finding(
            number,
            f"{where}: {disk.free_gib:.1f} GiB free, {options.min_free_gib:g} are needed: make "
            "room, or choose another folder",
        )
    speed = disk.write_mib_per_s
    if speed is not None and speed < options.min_write_mib_per_s:
        yield Finding(
            number,
            f"{where}: writes {speed:.1f} MiB/s, {options.min_write_mib_per_s:g} are needed: "
            "compare with the other nodes; if it is slow there too, the file system is busy",
        )


def clock_findings(nodes: Sequence[NodeFacts], options: PreflightOptions) -> Iterator[Finding]:
    """Find clocks that differ from the others (median of three or more)."""
    limit = options.max_clock_skew_seconds
    clocks = {node.number: node.clock for node in nodes if node.clock is not None}
    if not limit or len(clocks) < 2:
        return
    names = {node.number: node.name for node in nodes}
    advice = "set its clock (chrony, ntpd)"
    if len(clocks) == 2:
        (one, first), (two, second) = clocks.items()
        apart = second.ahead - first.ahead
        if abs(apart) - first.uncertainty - second.uncertainty > limit:
            for number, other, sign in ((one, two, -1), (two, one, 1)):
                text = f"its clock is {sign * apart:+.1f} s off that of {names[other]}"
                yield Finding(number, f"{text} (at most {limit:g}): {advice}", False)
        return
    middle = statistics.median_low(clock.ahead for clock in clocks.values())
    for number, clock in clocks.items():
        off = clock.ahead - middle
        if abs(off) - clock.uncertainty > limit:
            text = f"its clock is {off:+.1f} s off those of the other nodes (at most {limit:g})"
            yield Finding(number, f"{text}: {advice}")


def version_findings(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Find software that is not the same on all nodes."""
    nodes = [node for node in nodes if node.versions]
    for key in sorted({key for node in nodes for key in node.versions}):
        values = {
            node.number: version
            for node in nodes
            if (version := node.versions.get(key)) is not None
        }
        for number, text, certain in _odd_ones_out(values):
            yield Finding(
                number, f"{key}: {text}; give all nodes the same environment and code", certain
            )


def _odd_ones_out(values: Mapping[int, object]) -> Iterator[tuple[int, str, bool]]:
    """Yield the nodes whose value is not that of more than half of the nodes."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return
    usual, count = counts[0]
    certain = 2 * count > len(values)
    for number, value in values.items():
        if not certain:
            others = ", ".join(str(other) for other, _ in counts if other != value)
            yield number, f"{value} here, {others} on other nodes", False
        elif value != usual:
            yield number, f"{value} here, {usual} on the other nodes", True
