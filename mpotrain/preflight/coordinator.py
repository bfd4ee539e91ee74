"""The first rank of a pre-flight: it calls the roll, says what to measure, and gathers the facts.

A node that does not answer a command in time is left out of all later ones, so that a dead node
costs one waiting time and not one for each check.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpotrain.preflight.blame import further_pairs, ring_rounds
from mpotrain.preflight.bounded import Countdown
from mpotrain.preflight.clock import compare_clocks
from mpotrain.preflight.facts import ClockFacts, GroupFacts, NodeFacts, WorldFacts, rank_facts
from mpotrain.preflight.layout import Presence, expected_names, num_expected_nodes, roll_call
from mpotrain.preflight.member import Member
from mpotrain.preflight.options import RESERVE_SHARE
from mpotrain.preflight.verdict import pair_blame

CLOCK_SHARE = 0.1
"""Part of the time that the comparison of all clocks may take."""
MAX_CLOCK_SECONDS = 30.0
FURTHER_ROUNDS = 2
FAREWELL_SECONDS = 5.0
SHARED_SECONDS = 5.0
"""Network file systems show a new file to other nodes after some seconds."""
ROUND_SHARE = 0.4
"""Part of the time left that a round of all-reduces may take."""
MIN_ROUND_SECONDS = 1.0
MAX_ROUND_SECONDS = 60.0


class Coordinator:
    """Runs a pre-flight from its first rank."""

    def __init__(self, member: Member) -> None:
        """Run it with `member` as this rank's own part; the time of the pre-flight starts here."""
        self._member = member
        self._seat = member.seat
        self._channel = member.channel
        self._left = Countdown(self._seat.options.timeout_seconds)
        self._number = 0
        self._nodes: dict[int, NodeFacts] = {}
        self._ranks: dict[int, list[int]] = {}
        self._starts: dict[int, str] = {}
        self._inside: list[GroupFacts] = []
        self._pairs: list[GroupFacts] = []
        self._whole: GroupFacts | None = None

    def measure(self) -> WorldFacts:
        """Measure everything; takes no longer than the options allow.

        Returns:
            The facts about all expected nodes.
        """
        options = self._seat.options
        self._meet()
        self._check_nodes()
        if options.does("clock"):
            self._compare_clocks()
        if options.does("collectives"):
            self._reduce()
        self._read_cut_off()
        return WorldFacts(
            tuple(self._nodes[number] for number in sorted(self._nodes)),
            tuple(self._inside),
            tuple(self._pairs),
            self._whole,
        )

    def dismiss(self, ok: bool) -> None:
        """Tell all ranks the verdict, and wait until they have heard it."""
        self._command("end", "end", 0.0, ok=ok)
        others = [f"bye/{rank}" for rank in self._answering() if rank != 0]
        self._channel.fetch_all(others, FAREWELL_SECONDS)

    def _meet(self) -> None:
        seat, ranks = self._seat, self._seat.ranks
        seat.stage = "meeting"
        self._member.say_here()
        keys = [f"here/{rank}" for rank in range(ranks.size)]
        here = self._channel.fetch_all(keys, seat.options.meeting_seconds)
        present = [Presence(**message) for message in here.values()]
        num_nodes = num_expected_nodes(seat.environ, ranks)
        names = expected_names(seat.environ, ranks, seat.options.nodes, num_nodes)
        for node in roll_call(present, ranks.size, names):
            self._nodes[node.number] = node
            self._ranks[node.number] = [p.rank for p in present if p.node == node.number]
        # Where all ranks of a node are there, the first of them writes its report.
        self._starts = {p.node: p.start for p in reversed(present)}
        plan = {
            "seconds": self._left.remaining,
            "names": {number: node.name for number, node in self._nodes.items()},
            "ranks": self._ranks,
        }
        self._channel.post("plan", plan)
        # As the others will read it: JSON has no numbers as keys.
        self._member.take_plan(
            self._channel.fetch("plan", self._seat.options.grace_seconds) or plan
        )

    def _check_nodes(self) -> None:
        options = self._seat.options
        answers = self._issue("local", "checks of the node itself", options.local_seconds)
        for number, ranks in self._ranks.items():
            found = tuple(rank_facts(answers[rank]) for rank in ranks if rank in answers)
            self._update(number, ranks=found)
        self._member.report_node(self._number)
        if options.does("disk") and len(self._nodes) > 1:
            left = Countdown(min(SHARED_SECONDS, options.local_seconds))
            for number in self._whole_nodes():
                self._update(number, seen=self._sees(number, left))

    def _sees(self, number: int, left: Countdown) -> bool:
        name, start = self._nodes[number].name, self._starts[number]
        while not (found := self._seat.folder.sees(name, start)) and left.remaining:
            time.sleep(min(0.2, left.remaining))
        return found

    def _compare_clocks(self) -> None:
        limit = min(CLOCK_SHARE * self._seat.options.timeout_seconds, MAX_CLOCK_SECONDS)
        what, left = "comparison of clocks", Countdown(limit)
        numbers = [number for number in self._whole_nodes() if number != self._first]
        self._command("clock", what, limit)
        self._update(self._first, clock=ClockFacts(0.0, 0.0))
        for number in numbers:

            def ask(k: int, number: int = number) -> float | None:
                self._channel.post(f"clock/{number}/ask/{k}", {})
                # One that hangs must leave time for the others.
                seconds = min(limit / 3, left.remaining)
                said = self._channel.fetch(f"clock/{number}/say/{k}", seconds)
                return None if said is None else float(said["time"])

            self._update(number, clock=compare_clocks(ask))
        grace = self._seat.options.grace_seconds
        self._answers([r for r in self._answering() if r != 0], left.remaining + grace, what)

    def _reduce(self) -> None:
        several = [n for n in self._computing() if len(self._ranks[n]) > 1]
        if several:
            single = [(number,) for number in several]
            self._inside = self._groups("all-reduce inside the nodes", single)
        # A node that fails by itself would only spoil its neighbours' measurements.
        failed = {number for group in self._inside if group.error for number in group.nodes}
        rounds = ring_rounds([number for number in self._computing() if number not in failed])
        for k, pairs in enumerate(rounds, 1):
            what = f"all-reduce of pairs of nodes, round {k}"
            self._pairs += self._groups(what, pairs)
        for k in range(1, FURTHER_ROUNDS + 1):
            state = pair_blame(self._pairs, self._seat.options)
            silent = {n for n, node in self._nodes.items() if node.silent is not None}
            tried = [(pair.nodes[0], pair.nodes[1]) for pair in self._pairs]
            more = further_pairs(replace(state, unsure=state.unsure - silent), tried)
            what = f"all-reduce of doubtful pairs of nodes, round {k}"
            self._pairs += self._groups(what, more)
        good = pair_blame(self._pairs, self._seat.options).good
        together = [number for number in self._computing() if number in good]
        if len(together) > 2:
            whole = self._groups("all-reduce of all nodes", [tuple(together)])
            self._whole = whole[0] if whole else None

    def _groups(self, what: str, groups: Sequence[tuple[int, ...]]) -> list[GroupFacts]:
        """Run an all-reduce in every group of nodes at once, but those with a silent node."""
        groups = [nodes for nodes in groups if set(nodes) <= set(self._computing())]
        if not groups:
            return []
        # Where all is good a round takes a second. The first one that hangs may take long, so
        # that a slow node is not taken for a dead one, and still leave time for those after it.
        time_left = self._left.remaining - RESERVE_SHARE * self._seat.options.timeout_seconds
        limit = min(max(ROUND_SHARE * time_left, MIN_ROUND_SECONDS), MAX_ROUND_SECONDS)
        members = [[rank for number in nodes for rank in self._ranks[number]] for nodes in groups]
        orders = [
            {"name": f"group/{self._number + 1}/{k}", "nodes": nodes, "ranks": ranks}
            for k, (nodes, ranks) in enumerate(zip(groups, members, strict=True))
        ]
        device = "cuda" if self._with_gpus() else "cpu"
        answers = self._issue("group", what, limit, groups=orders, device=device)
        return [
            _outcome(nodes, {rank: answers.get(rank) for rank in ranks})
            for nodes, ranks in zip(groups, members, strict=True)
        ]

    def _issue(self, kind: str, what: str, limit: float, **more: Any) -> dict[int, dict[str, Any]]:
        """Give a command to all ranks and return the answers that come in time, by rank."""
        left = Countdown(limit + self._seat.options.grace_seconds)
        self._command(kind, what, limit, **more)
        command = {"kind": kind, "what": what, "limit": limit, **more}
        self._channel.post(f"answer/{self._number}/0", self._member.obey(command))
        return self._answers(self._answering(), left.remaining, what)

    def _answers(
        self, ranks: Sequence[int], seconds: float, what: str
    ) -> dict[int, dict[str, Any]]:
        """Return the answers to the last command that come in time; note who does not answer."""
        keys = {f"answer/{self._number}/{rank}": rank for rank in ranks}
        found = self._channel.fetch_all(keys, seconds)
        answers = {keys[key]: answer for key, answer in found.items()}
        for number, own in self._ranks.items():
            if any(rank in ranks and rank not in answers for rank in own):
                self._update(number, silent=what)
        return answers

    def _command(self, kind: str, what: str, limit: float, **more: Any) -> None:
        self._number += 1
        self._seat.stage = what
        command = {"kind": kind, "what": what, "limit": limit, **more}
        self._channel.post(f"command/{self._number}", command)

    def _read_cut_off(self) -> None:
        """Look for reports of nodes that run but could not get here."""
        if all(node.met for node in self._nodes.values()):
            return
        for number, content in self._seat.reports().items():
            if number in self._nodes and not self._nodes[number].met:
                own = {key: content.get(key) for key in ("unreachable", "broken")}
                self._update(number, name=str(content["node"]), **own)

    @property
    def _first(self) -> int:
        return self._seat.ranks.node_rank

    def _update(self, number: int, **news: Any) -> None:
        self._nodes[number] = replace(self._nodes[number], **news)

    def _answering(self) -> list[int]:
        """Ranks that are there and have answered every command so far."""
        return [
            rank
            for number, ranks in self._ranks.items()
            for rank in ranks
            if self._nodes[number].silent is None
        ]

    def _whole_nodes(self) -> list[int]:
        """Nodes all of whose ranks answer."""
        return [
            number
            for number, node in sorted(self._nodes.items())
            if node.silent is None and node.met >= node.num_ranks
        ]

    def _computing(self) -> list[int]:
        """Nodes that can take part in collectives."""
        with_gpus = self._with_gpus()
        return [
            number
            for number in self._whole_nodes()
            if self._nodes[number].can_compute and (not with_gpus or _has_gpus(self._nodes[number]))
        ]

    def _with_gpus(self) -> bool:
        return any(_has_gpus(node) for node in self._nodes.values())


def _has_gpus(node: NodeFacts) -> bool:
    return bool(node.ranks) and all(rank.device is not None for rank in node.ranks)


def _outcome(nodes: tuple[int, ...], answers: Mapping[int, dict[str, Any] | None]) -> GroupFacts:
    """Merge what the ranks of a group say: one error is one too many, the slowest counts."""
    errors = [
        f"rank {rank}: {'no answer' if answer is None else answer['error']}"
        for rank, answer in answers.items()
        if answer is None or answer["error"] is not None
    ]
    if errors:
        return GroupFacts(nodes, error=min(errors, key=_vagueness))
    return GroupFacts(nodes, min(_speeds(answers.values())))


def _vagueness(error: str) -> int:
    """Sort errors that tell something before those that tell only of waiting."""
    return sum(word in error for word in ("did not finish", "no answer", "imed out"))


def _speeds(answers: Iterable[dict[str, Any] | None]) -> Iterable[float]:
    return (float(answer["gib_per_s"]) for answer in answers if answer is not None)
