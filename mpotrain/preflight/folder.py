"""The folder of reports: `node-NAME.json` by each node as it goes, `summary.json` at the end.

Earlier pre-flights may have left files there. Every process therefore marks its files with an
identity of its own, which those that it can reach learn from it, and with the world it belongs to.
Where nothing else is known of a file, it counts if it is of this world and not older than this
pre-flight, by the clock of the file server.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

from mpotrain.durable import write_durably
from mpotrain.errors import MpotrainError
from mpotrain.preflight.bounded import Task

FORMAT = 1
SUMMARY_NAME = "summary.json"
WRITE_SECONDS = 15.0
"""A file system that takes longer for a small file is broken."""


class ReportFolder:
    """The folder as one process sees it.

    Attributes:
        path: where it is.
        start: identity of this process's files.
    """

    def __init__(self, path: Path, world: str) -> None:
        """Note which summary is there from an earlier pre-flight.

        Args:
            path: where it is.
            world: what tells the processes of this world from those of others.
        """
        self.path = path
        self.start = uuid.uuid4().hex
        self._world = world
        self._old_summary = _read(path / SUMMARY_NAME).get("start")

    def write(self, name: str, content: dict[str, Any]) -> str | None:
        """Write a file whole, within a time limit.

        Args:
            name: of the file.
            content: JSON.

        Returns:
            What went wrong; None if nothing did.
        """
        marks = {"format": FORMAT, "start": self.start, "world": self._world}
        marked = {**marks, "time": time.time(), **content}
        data = (json.dumps(marked, indent=1) + "\n").encode()

        def action() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_durably(self.path / name, data)

        try:
            Task(action, f"writing {self.path / name}").result(WRITE_SECONDS)
        except (OSError, MpotrainError) as error:  # TimeoutError is an OSError
            return f"{self.path / name} cannot be written: {error}"
        return None

    def has_summary(self) -> bool:
        """Tell whether somebody has written the summary of this pre-flight."""
        content = _read(self.path / SUMMARY_NAME)
        return content.get("format") == FORMAT and content.get("start") != self._old_summary

    def sees(self, node: str, start: str) -> bool:
        """Tell whether the report of a node is there.

        Args:
            node: name of the node.
            start: identity of the files of the process that wrote it.
        """
        return _read(self.path / report_name(node)).get("start") == start

    def reports(self, node: str, seconds: float) -> dict[int, dict[str, Any]]:
        """Return the reports of nodes in this pre-flight, by number of the node.

        Args:
            node: name of this node, whose own report tells the time of the file server.
            seconds: by how much reports of this pre-flight can be older than that.
        """
        found = {}
        try:
            oldest = (self.path / report_name(node)).stat().st_mtime - seconds
            for path in sorted(self.path.glob("node-*.json")):
                content = _read(path) if path.stat().st_mtime >= oldest else {}
                if (content.get("format"), content.get("world")) == (FORMAT, self._world):
                    found[int(content["number"])] = content
        except OSError:
            return found
        return found


def report_name(node: str) -> str:
    """Return the name of a node's file.

    Args:
        node: name of the node.
    """
    return f"node-{re.sub(r'[^A-Za-z0-9._-]', '_', node)}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
