"""What every rank of a pre-flight carries with it: identity, options, report, time limit."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from mpotrain.errors import EXIT_BAD_INPUT
from mpotrain.parallel.environment import Ranks
from mpotrain.preflight.bounded import HardLimit, Task
from mpotrain.preflight.folder import ReportFolder, report_name
from mpotrain.preflight.layout import world_name
from mpotrain.preflight.options import RESERVE_SECONDS, PreflightOptions

LAST_WORDS_SECONDS = 3.0


class Seat:
    """One rank of a pre-flight.

    Attributes:
        ranks: place of this process.
        options: of the pre-flight.
        environ: environment variables.
        name: of this node.
        folder: of the reports.
        stage: what it is doing, for its last words.
        limit: ends the process, whatever hangs.
    """

    def __init__(
        self,
        ranks: Ranks,
        options: PreflightOptions,
        environ: Mapping[str, str],
        name: str,
    ) -> None:
        """Take the seat; from here on the time runs."""
        self.ranks = ranks
        self.options = options
        self.environ = environ
        self.name = name
        self.stage = "start"
        self._content: dict[str, Any] = {}
        self.limit = HardLimit(options.timeout_seconds + RESERVE_SECONDS, self._give_up)
        self.folder = ReportFolder(options.out, world_name(environ, ranks))

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.ranks.local_rank == 0

    def report(self, **news: Any) -> str | None:
        """Add to the report of the node, and write it.

        Args:
            news: JSON; later values of a key replace earlier ones.

        Returns:
            What went wrong with writing; None if nothing did, or if another rank writes it.
        """
        self._content |= news
        self._content["ok"] = self._is_well()
        if not self.leads:
            return None
        who = {"node": self.name, "number": self.ranks.node_rank, "stage": self.stage}
        return self.folder.write(report_name(self.name), who | self._content)

    def _is_well(self) -> bool:
        found = self._content
        return found.get("problems") == [] and not (found.get("broken") or found.get("unreachable"))

    def reports(self) -> dict[int, dict[str, Any]]:
        """Return the reports of all nodes that have written one, by number of the node."""
        return self.folder.reports(self.name, 2 * self.options.timeout_seconds)

    def _give_up(self) -> None:
        text = f"{self.name}: the pre-flight hangs in its stage: {self.stage}"
        sys.stderr.write(f"rank {self.ranks.rank}: error: {text}\n")
        sys.stderr.flush()
        if self.leads:
            news = {"broken": f"it hung in its stage: {self.stage}"}
            try:
                Task(lambda: self.report(**news), "last words").result(LAST_WORDS_SECONDS)
            except Exception as error:
                sys.stderr.write(f"rank {self.ranks.rank}: no report: {error}\n")
        # Threads hang in a driver or a file system: only this ends the process for sure.
        os._exit(EXIT_BAD_INPUT)
