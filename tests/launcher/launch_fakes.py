"""Programs that stand in for SLURM and Python on PATH and write down how they were called."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_RECORDER = """\
#!{python} -S
import json, os, sys
# surrogateescape: what is no UTF-8 must arrive as it was.
call = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
with open({calls!r}, "a") as file:
    file.write(json.dumps(call) + "\\n")
sys.stdout.write({output!r})
sys.stderr.write({errors!r})
then = {then!r}
if then:
    os.execvp(then[0], then + sys.argv[1:])
sys.exit({code})
"""

RUN_FILE = f"""\
extends = ['{ROOT}/configs/runs/demo-moe.toml']
name = "small"
folder = "runs/small"

[engine]
kind = "deepspeed"
device = "cpu"

[train]
global_batch_size = 8
"""
"""A run that fits 1, 2 and 4 ranks."""

CLUSTER_FILE = """\
nodes = 2
ranks_per_node = 2
partition = "main"
python = "/opt/python"
"""


@dataclass(frozen=True)
class Fake:
    """A program that records its calls.

    Attributes:
        path: the program.
        record: where its calls are written.
    """

    path: Path
    record: Path

    def calls(self) -> list[dict[str, Any]]:
        """Return all calls: `argv` without the program, `cwd`, `environment`."""
        if not self.record.exists():
            return []
        return [json.loads(line) for line in self.record.read_text().splitlines()]


def make_fake(
    folder: Path,
    name: str,
    *,
    output: str = "",
    errors: str = "",
    code: int = 0,
    then: tuple[str, ...] = (),
) -> Fake:
    """Write a program that records its calls.

    Args:
        folder: where to put it.
        name: of the program.
        output: what it prints.
        errors: what it prints to stderr.
        code: its exit code.
        then: program (and first arguments) that it becomes afterwards, with its own arguments.
    """
    folder.mkdir(exist_ok=True)
    fake = Fake(folder / name, folder / f".{name}.calls")
    text = _RECORDER.format(
        python=sys.executable,
        calls=str(fake.record),
        output=output,
        errors=errors,
        code=code,
        then=list(then),
    )
    fake.path.write_text(text)
    fake.path.chmod(fake.path.stat().st_mode | stat.S_IXUSR)
    return fake
