"""One pre-flight on one rank: from the environment to the verdict (torch is imported on the way).

Whatever happens, the process ends in bounded time, and what is known stands in files: a node that
cannot reach the first one says so in its report; where the first rank itself is gone, the lowest
of those that miss it writes the summary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpotrain.errors import ParallelError
from mpotrain.parallel.environment import export_environment, resolve_environment
from mpotrain.preflight.facts import NodeFacts, WorldFacts, rank_facts
from mpotrain.preflight.folder import SUMMARY_NAME
from mpotrain.preflight.layout import (
    expected_names,
    node_name,
    num_expected_nodes,
    world_of_nodes,
)
from mpotrain.preflight.options import RESERVE_SECONDS, PreflightOptions
from mpotrain.preflight.seat import Seat
from mpotrain.preflight.text import summary_of
from mpotrain.preflight.verdict import BadNode, Verdict, judge

if TYPE_CHECKING:
    from mpotrain.preflight.channel import Channel


class BrokenNodeError(ParallelError):
    """This node cannot even look for the others."""


@dataclass(frozen=True)
class Result:
    """How a pre-flight ended for this rank.

    Attributes:
        ok: whether all nodes are good.
        summary: content of `summary.json`, on the rank that wrote it; None on the others.
    """

    ok: bool
    summary: dict[str, Any] | None = None


def preflight(options: PreflightOptions, environ: MutableMapping[str, str]) -> Result:
    """Check all nodes of the world as one of its ranks.

    Args:
        options: the same on all ranks.
        environ: environment variables, usually `os.environ`.

    Returns:
        The verdict, which all ranks that can be reached agree on.

    Raises:
        ParallelError: the environment is inconsistent, or the first rank cannot be reached.
    """
    ranks, name = resolve_environment(environ), node_name(environ)
    if options.per_node_start:
        ranks = world_of_nodes(environ, ranks, options.nodes, name)
    # The command line ends processes of a world without tearing libraries down, which can hang.
    export_environment(ranks, environ, ranks.local_rank)
    # torch logs a page of C++ frames for every wait that times out; the verdict says it shorter.
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    seat = Seat(ranks, options, environ, name)
    try:
        channel = _open(seat)
        if ranks.rank == 0:
            return _coordinate(seat, channel)
        from mpotrain.preflight.member import Member

        return Result(Member(seat, channel).follow())
    except ParallelError as error:
        if ranks.rank == 0:
            return Result(False, _failed(seat, error))
        _orphan(seat, error)
        raise
    finally:
        seat.limit.cancel()


def _open(seat: Seat) -> Channel:
    seat.stage = "import of torch"
    try:
        from mpotrain.preflight.channel import open_channel
        from mpotrain.preflight.member import Member  # everything that a member needs
    except Exception as error:
        raise BrokenNodeError(
            f"the libraries cannot be imported ({type(error).__name__}: {error}): mend the "
            "environment of the node"
        ) from error
    del Member
    seat.stage = "search for the first rank"
    return open_channel(seat.ranks, seat.options.search_seconds)


def _coordinate(seat: Seat, channel: Channel) -> Result:
    from mpotrain.preflight.coordinator import Coordinator
    from mpotrain.preflight.member import Member

    start = time.monotonic()
    coordinator = Coordinator(Member(seat, channel))
    facts = coordinator.measure()
    summary = _write_summary(seat, facts, judge(facts, seat.options), start)
    coordinator.dismiss(summary["ok"])
    return Result(summary["ok"], summary)


def _write_summary(seat: Seat, facts: WorldFacts, verdict: Verdict, start: float) -> dict[str, Any]:
    summary = summary_of(facts, verdict, time.monotonic() - start)
    error = seat.folder.write(SUMMARY_NAME, summary)
    if error is not None:
        summary["problems"].append(error)
        summary["ok"] = False
    return summary


def _failed(seat: Seat, error: ParallelError) -> dict[str, Any]:
    """Write a summary without measurements: the first rank itself failed."""
    number, name, text = seat.ranks.node_rank, seat.name, str(error)
    seat.report(broken=text)
    verdict = Verdict(problems=(text,))
    if isinstance(error, BrokenNodeError):
        verdict = Verdict((BadNode(name, number, (text,), certain=True),))
    return _write_summary(seat, WorldFacts((NodeFacts(number, name),)), verdict, time.monotonic())


def _orphan(seat: Seat, error: ParallelError) -> None:
    """Say in the node's report that the first rank is missed, and see that there is a summary.

    The first rank may well go on without this node. Leaving before it is ready would make srun
    end the whole step, so wait for its summary as long as it can take.
    """
    start = time.monotonic()
    kind = "broken" if isinstance(error, BrokenNodeError) else "unreachable"
    seat.report(**{kind: str(error)})
    while seat.limit.remaining > RESERVE_SECONDS:
        if seat.folder.has_summary():
            return
        time.sleep(0.5)
    reports = seat.reports()
    if seat.leads and min(reports, default=seat.ranks.node_rank) >= seat.ranks.node_rank:
        facts = _facts_of_orphans(seat, reports)
        _write_summary(seat, facts, judge(facts, seat.options), start)


def _facts_of_orphans(seat: Seat, reports: Mapping[int, dict[str, Any]]) -> WorldFacts:
    """Return what nodes without the first rank know of each other, through their reports."""
    num_nodes = num_expected_nodes(seat.environ, seat.ranks)
    names = expected_names(seat.environ, seat.ranks, seat.options.nodes, num_nodes)
    nodes = []
    for number, name in enumerate(names):
        report = reports.get(number)
        if report is None:
            nodes.append(NodeFacts(number, name, seat.ranks.local_size, 0))
            continue
        found = tuple(rank_facts(rank) for rank in report.get("ranks", ()))
        nodes.append(
            NodeFacts(
                number,
                report["node"],
                seat.ranks.local_size,
                0,
                found,
                unreachable=report.get("unreachable"),
                broken=report.get("broken"),
            )
        )
    return WorldFacts(tuple(nodes))
