"""What every rank of a pre-flight does when the first rank says so."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mpotrain.errors import ParallelError
from mpotrain.preflight import clock
from mpotrain.preflight.bounded import Countdown, Task
from mpotrain.preflight.channel import Channel, LostContactError
from mpotrain.preflight.collective import all_reduce_speed
from mpotrain.preflight.disk import measure_disk
from mpotrain.preflight.facts import (
    DiskFacts,
    NodeFacts,
    RankFacts,
    WorldFacts,
    plain,
    rank_facts,
)
from mpotrain.preflight.gpus import check_gpus, gpu_uuid, rank_device
from mpotrain.preflight.options import RESERVE_SECONDS
from mpotrain.preflight.seat import Seat
from mpotrain.preflight.verdict import judge
from mpotrain.preflight.versions import node_versions

T = TypeVar("T")


class Member:
    """One rank that follows the first one's commands.

    Attributes:
        seat: who it is.
        channel: to the first rank.
    """

    def __init__(self, seat: Seat, channel: Channel) -> None:
        """Follow commands that come through `channel`."""
        self.seat = seat
        self.channel = channel
        self._local_ranks: list[int] = []
        self._collectives: list[dict[str, Any]] = []

    def say_here(self) -> None:
        """Tell the first rank that this one is there."""
        ranks = self.seat.ranks
        self.channel.post(
            f"here/{ranks.rank}",
            {
                "rank": ranks.rank,
                "node": ranks.node_rank,
                "name": self.seat.name,
                "local_size": ranks.local_size,
                "start": self.seat.folder.start,
            },
        )

    def take_plan(self, plan: Mapping[str, Any]) -> None:
        """Learn from the first rank who is there and how much time is left."""
        number = str(self.seat.ranks.node_rank)
        late = self.seat.options.grace_seconds + RESERVE_SECONDS
        self.seat.limit.reset(plan["seconds"] + late)
        self.seat.name = plan["names"][number]
        self._local_ranks = plan["ranks"][number]
        self.seat.report()

    def follow(self) -> bool:
        """Do what the first rank says until it has a verdict; return whether all is good.

        Raises:
            LostContactError: the first rank is gone.
        """
        self.seat.stage = "meeting"
        self.say_here()
        self.take_plan(self._next("plan"))
        number = 0
        while True:
            number += 1
            command = self._next(f"command/{number}")
            self.seat.stage = command["what"]
            if command["kind"] == "end":
                self.channel.post(f"bye/{self.seat.ranks.rank}", {})
                return bool(command["ok"])
            self.channel.post(f"answer/{number}/{self.seat.ranks.rank}", self.obey(command))
            if command["kind"] == "local":
                self.report_node(number)

    def obey(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a command and return the answer, within the limit that it sets."""
        actions = {"local": self._local, "clock": self._clock, "group": self._group}
        return actions[command["kind"]](command)

    def report_node(self, number: int) -> None:
        """Write what all ranks of the node answered to a command into the node's report."""
        if self.seat.leads:
            keys = [f"answer/{number}/{rank}" for rank in self._local_ranks]
            answers = self.channel.fetch_all(keys, self.seat.options.grace_seconds)
            found = [answers[key] for key in keys if key in answers]
            self.seat.report(ranks=found, problems=self._own_problems(found))

    def _own_problems(self, ranks: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what is wrong with the node whatever the others are like."""
        number, size = self.seat.ranks.node_rank, len(self._local_ranks)
        found = tuple(map(rank_facts, ranks))
        node = NodeFacts(number, self.seat.name, size, len(found), found)
        verdict = judge(WorldFacts((node,)), self.seat.options)
        return [problem for bad in verdict.bad_nodes for problem in bad.problems]

    def _next(self, key: str) -> dict[str, Any]:
        seconds = max(0.0, self.seat.limit.remaining - RESERVE_SECONDS)
        message = self.channel.fetch(key, seconds)
        if message is None:
            raise LostContactError("the first rank gave no further sign")
        return message

    def _local(self, command: Mapping[str, Any]) -> dict[str, Any]:
        seat, seconds = self.seat, command["limit"]
        gpus = Task(self._gpus, "the test of the GPUs")
        versions = Task(self._versions, "reading versions")
        errors: list[str] = []
        # One after the other: the two folders may lie on one disk.
        disks = tuple(_disk(purpose, path, seconds / 2) for purpose, path in self._folders())
        device, tests, wrong = _outcome(gpus, seconds, errors) or (None, (), [])
        found = RankFacts(
            seat.ranks.rank,
            device,
            tests,
            disks,
            _outcome(versions, seconds, errors) or {},
            (*errors, *wrong),
        )
        if (error := seat.report(ranks=[plain(found)])) is not None:
            found = replace(found, errors=(*found.errors, error))
        answer: dict[str, Any] = plain(found)
        return answer

    def _folders(self) -> list[tuple[str, Path]]:
        seat = self.seat
        if not (seat.leads and seat.options.does("disk")):
            return []
        temporary = Path(seat.environ.get("TMPDIR") or tempfile.gettempdir())
        return [("run folder", seat.options.written_folder), ("temporary folder", temporary)]

    def _versions(self) -> dict[str, str | None]:
        wanted = self.seat.leads and self.seat.options.does("versions")
        return node_versions() if wanted else {}

    def _gpus(self) -> tuple[str | None, tuple[Any, ...], list[str]]:
        ranks, options = self.seat.ranks, self.seat.options
        if options.does("gpus"):
            return check_gpus(ranks, options.device)
        try:
            device = rank_device(ranks, options.device)
        except ParallelError as error:
            return None, (), [str(error)]
        return (gpu_uuid(device) if device.type == "cuda" else None), (), []

    def _clock(self, command: Mapping[str, Any]) -> dict[str, Any]:
        number = self.seat.ranks.node_rank
        left = Countdown(command["limit"])
        if self.seat.leads:
            for k in range(clock.NUM_EXCHANGES):
                if self.channel.fetch(f"clock/{number}/ask/{k}", left.remaining) is None:
                    break
                self.channel.post(f"clock/{number}/say/{k}", {"time": clock.wall_time()})
        return {}

    def _group(self, command: Mapping[str, Any]) -> dict[str, Any]:
        rank, seconds = self.seat.ranks.rank, command["limit"]
        group = next((group for group in command["groups"] if rank in group["ranks"]), None)
        if group is None:
            return {}
        answer: dict[str, Any] = {"gib_per_s": None, "error": None}
        index, size = group["ranks"].index(rank), len(group["ranks"])

        def all_reduce() -> float:
            device = rank_device(self.seat.ranks, command["device"])
            store = self.channel.part(group["name"])
            return all_reduce_speed(store, index, size, device, seconds)

        try:
            answer["gib_per_s"] = Task(all_reduce, "the all-reduce").result(seconds)
        except Exception as error:  # whatever a broken network makes libraries raise
            answer["error"] = _first_line(error)
        self._collectives.append({"what": command["what"], "nodes": group["nodes"], **answer})
        self.seat.report(collectives=self._collectives)
        return answer


def _disk(purpose: str, path: Path, seconds: float) -> DiskFacts:
    hung: list[str] = []
    task = Task(partial(measure_disk, purpose, path), "writing")
    return _outcome(task, seconds, hung) or DiskFacts(purpose, str(path), error="; ".join(hung))


def _outcome(task: Task[T], seconds: float, errors: list[str]) -> T | None:
    """Return what a task found; None if it failed, with the reason added to `errors`."""
    try:
        return task.result(seconds)
    except Exception as error:  # whatever broken drivers and libraries raise
        errors.append(_first_line(error))
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
