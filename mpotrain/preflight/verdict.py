"""The verdict of a pre-flight: measurements in, bad nodes out (no torch, no I/O)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpotrain.preflight.blame import Blame, Pair, blame
from mpotrain.preflight.facts import GroupFacts, NodeFacts, WorldFacts
from mpotrain.preflight.findings import (
    Finding,
    answer_findings,
    clock_findings,
    disk_findings,
    error_findings,
    gpu_findings,
    shared_findings,
    version_findings,
)
from mpotrain.preflight.options import PreflightOptions

NETWORK_ADVICE = (
    "check the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), that host names resolve to "
    "addresses of that network, and the firewall"
)


@dataclass(frozen=True)
class BadNode:
    """A node that the job had better not run on.

    Attributes:
        node: its name.
        number: its number.
        problems: what is wrong and what to do, one text each.
        certain: False where it may be another one of the nodes named as uncertain.
    """

    node: str
    number: int
    problems: tuple[str, ...]
    certain: bool


@dataclass(frozen=True)
class Verdict:
    """What a pre-flight found.

    Attributes:
        bad_nodes: by number.
        problems: those of no single node.
        warnings: oddities that are no reason to stop.
    """

    bad_nodes: tuple[BadNode, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the job may start."""
        return not (self.bad_nodes or self.problems)


def judge(facts: WorldFacts, options: PreflightOptions) -> Verdict:
    """Return which nodes are bad.

    Args:
        facts: what was measured.
        options: what is asked for.
    """
    findings = list(_findings(facts, options))
    bad_nodes = []
    for node in facts.nodes:
        own = [finding for finding in findings if finding.node == node.number]
        if own:
            texts = tuple(dict.fromkeys(finding.text for finding in own))
            certain = any(finding.certain for finding in own)
            bad_nodes.append(BadNode(node.name, node.number, texts, certain))
    problems = tuple(finding.text for finding in findings if finding.node is None)
    return Verdict(tuple(bad_nodes), problems, tuple(_warnings(facts)))


def pair_blame(pairs: Sequence[GroupFacts], options: PreflightOptions) -> Blame:
    """Return what the pairs tried so far say of their nodes."""
    passed: list[Pair] = []
    failed: list[Pair] = []
    for pair in pairs:
        one, two = pair.nodes
        (passed if _passes(pair, options) else failed).append((one, two))
    return blame(passed, failed)


def _findings(facts: WorldFacts, options: PreflightOptions) -> Iterator[Finding]:
    nodes = facts.nodes
    yield from answer_findings(nodes, options)
    for node in nodes:
        yield from error_findings(node)
        yield from disk_findings(node, options)
    yield from shared_findings(nodes, options)
    yield from gpu_findings(nodes, options)
    yield from version_findings(nodes)
    yield from clock_findings(nodes, options)
    for group in facts.inside:
        if not _passes(group, options):
            yield Finding(
                group.nodes[0],
                f"the all-reduce inside the node {_seen(group, options)}; exclude the node, and "
                "look at its links between GPUs, shared memory and load",
            )
    yield from _pair_findings(facts, options)
    if facts.whole is not None and facts.whole.error is not None:
        yield Finding(
            None,
            f"the all-reduce over all {len(facts.whole.nodes)} good nodes failed, though it "
            f"worked between pairs of them ({facts.whole.error}): look at limits that grow with "
            "the number of nodes (open files, ports, memory)",
        )


def _pair_findings(facts: WorldFacts, options: PreflightOptions) -> Iterator[Finding]:
    state = pair_blame(facts.pairs, options)
    names = {node.number: node.name for node in facts.nodes}
    # Nodes that fell silent are named for that; their partners' failures say nothing new.
    silent = {node.number for node in facts.nodes if node.silent is not None}
    unsure = state.unsure - silent
    if len(unsure) > 2 and not state.good:
        error = next(_seen(pair, options) for pair in facts.pairs)
        yield Finding(
            None,
            f"no pair of nodes could work together (all-reduce {error}): rather a setting than "
            f"a node; {NETWORK_ADVICE}",
        )
        return
    for number in sorted((state.bad | unsure) - silent):
        own = [pair for pair in facts.pairs if number in pair.nodes]
        alive = [pair for pair in own if not silent & set(pair.nodes)]
        if not alive:
            continue
        partners = ", ".join(names[node] for p in alive for node in p.nodes if node != number)
        text = f"the all-reduce with {partners} {_seen(alive[0], options)}"
        if number in state.bad:
            yield Finding(number, f"{text}, though others work together: exclude it")
        else:
            yield Finding(number, f"{text}: one of them is bad; {NETWORK_ADVICE}", False)
    for link in state.links:
        pair = next(pair for pair in facts.pairs if pair.nodes == link)
        for number, other in (link, link[::-1]):
            yield Finding(
                number,
                f"the all-reduce with {names[other]} {_seen(pair, options)}, though both work "
                "with other nodes: the way between the two is bad; exclude one of them",
                False,
            )


def _passes(group: GroupFacts, options: PreflightOptions) -> bool:
    speed = group.gib_per_s
    return group.error is None and speed is not None and speed >= options.min_bandwidth_gib_per_s


def _seen(group: GroupFacts, options: PreflightOptions) -> str:
    if group.error is not None or group.gib_per_s is None:
        return f"failed ({group.error})"
    return f"ran at {group.gib_per_s:.3g} GiB/s, {options.min_bandwidth_gib_per_s:g} are needed"


def _warnings(facts: WorldFacts) -> Iterator[str]:
    names = {node.number: node.name for node in facts.nodes}
    speeds = {
        "-".join(names[node] for node in pair.nodes): pair.gib_per_s
        for pair in facts.pairs
        if pair.gib_per_s is not None
    }
    yield from _laggards(speeds, 0.5, "all-reduce between {}", "GiB/s")
    flops = {
        f"{gpu.uuid} of {node.name}": gpu.tflops
        for node in facts.nodes
        for gpu in node.gpus
        if gpu.tflops is not None
    }
    yield from _laggards(flops, 0.75, "GPU {}", "TFLOP/s")
    yield from _writes(facts.nodes)
    if any(node.clock for node in facts.nodes):
        for node in facts.nodes:
            if node.clock is None and node.met and node.silent is None:
                yield f"the clock of {node.name} was not compared: time was up"


def _writes(nodes: Sequence[NodeFacts]) -> Iterator[str]:
    writes = {
        node.name: disk.write_mib_per_s
        for node in nodes
        for disk in node.disks
        if disk.purpose == "run folder" and disk.write_mib_per_s is not None
    }
    yield from _laggards(writes, 0.25, "writing into the run folder from {}", "MiB/s")


def _laggards(values: dict[str, float], part: float, what: str, unit: str) -> Iterator[str]:
    """Yield the values of three or more that are less than `part` of the median."""
    if len(values) < 3:
        return
    usual = statistics.median(values.values())
    for name, value in values.items():
        if value < part * usual:
            yield f"{what.format(name)}: {value:.3g} {unit}, the median is {usual:.3g}"
