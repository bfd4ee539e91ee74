"""A stand-in for the SLURM of one job: srun, squeue, scontrol, scancel and sbatch on PATH.

They are one constant program that writes down its calls and answers from files of a folder, which
tests write: `state`, `steps`, `pids`, `job`, `dependents`, `dead` (nodes), `refuse` (what sbatch
--test-only says), `fail-NAME` (what the command NAME fails with), `then-state` (the state behind a
failed command), `ranks.py` (what the training
step does), `check.py` (what the pre-flight does).
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from test_life_log import checkpoint

JOB = "100"
COMMANDS = ("srun", "squeue", "scontrol", "scancel", "sbatch")

_PROGRAM = r"""
import json, os, signal, sys, time
name, arguments, at = os.path.basename(sys.argv[0]), sys.argv[1:], os.environ["STAND_IN"]
def read(file, default=""):
    try:
        with open(f"{at}/{file}") as stream:
            return stream.read()
    except FileNotFoundError:
        return default
def write(file, text=""):
    with open(f"{at}/{file}", "w") as stream:
        stream.write(text)
def answer(text):
    sys.stdout.write(text)
    sys.exit(0)
own = {key: os.environ.get(key) for key in ("SLURM_NTASKS", "SLURM_RESTART_COUNT", "MASTER_PORT")}
own["ignores TERM"] = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
with open(f"{at}/calls.jsonl", "a") as stream:
    stream.write(json.dumps([name, arguments, own]) + "\n")
verb = arguments[0] if name == "scontrol" else ""
for failing in (name, f"{name}-{verb}"):
    if os.path.exists(f"{at}/fail-{failing}"):
        if read("then-state"):
            write("state", read("then-state"))
        sys.stderr.write(read(f"fail-{failing}"))
        sys.exit(1)
if name == "squeue":
    if "--steps" in arguments:
        answer(read("steps"))
    if "--me" in arguments:
        answer(read("dependents"))
    answer(read("state", "100|RUNNING|None\n"))
if name == "scontrol":
    if arguments[:2] == ["show", "hostnames"]:
        answer("n1\nn2\n")
    if "node" in arguments:
        answer("NodeName=n1 NodeAddr=10.0.0.1 State=IDLE")
    if "job" in arguments:
        answer(read("job"))
    if verb == "listpids":
        answer("PID JOBID STEPID LOCALID GLOBALID\n1 100 batch 0 0\n" + read("pids"))
    if verb == "requeue":
        write("lives-at-requeue", read("lives"))
        write("state", "100|PENDING|BeginTime\n")
if name == "scancel":
    write("signal-" + arguments[0].partition("=")[2], arguments[1])
    if arguments[0] == "--signal=KILL":
        write("steps")
if name == "sbatch":
    if "--test-only" in arguments:
        sys.stderr.write(read("refuse"))
        sys.exit(bool(read("refuse")))
    answer("101\n")
if name == "srun":
    if arguments[-1] == "true":
        node = next(a for a in arguments if a.startswith("--nodelist=")).partition("=")[2]
        sys.exit(node in read("dead").split())
    script = "check.py" if "preflight" in arguments else "ranks.py"
    write("srun-pid", str(os.getpid()))
    exec(compile(read(script), script, "exec"))
"""


class StandIn:
    """The stand-in of one test.

    Attributes:
        folder: files that answer.
        run: the run folder.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.run, commands = root / "slurm", root / "run", root / "bin"
        for path in (self.folder, self.run, commands):
            path.mkdir()
        program = commands / "program"
        program.write_text(f"#!{sys.executable} -IS\n{_PROGRAM}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        for name in COMMANDS:
            (commands / name).symlink_to(program)
        for key in [key for key in os.environ if key.startswith("SLURM")]:
            monkeypatch.delenv(key)
        monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        monkeypatch.setenv("STAND_IN", str(self.folder))
        monkeypatch.setenv("SLURM_JOB_ID", JOB)
        monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
        monkeypatch.setenv("SLURM_NTASKS", "2")
        self.ranks("")

    def write(self, name: str, text: str) -> None:
        """Set an answer."""
        (self.folder / name).write_text(text)

    def start_again(self) -> None:
        """Let a job that was requeued run once more."""
        state = self.folder / "state"
        if state.exists() and "PENDING" in state.read_text():
            state.unlink()

    def ranks(self, code: str) -> None:
        """Set what the training step does; `save(step)` and `outcome(...)` act as ranks do.

        It can wait for other things than time: `until(file)` is there, `told(event, times)` of the
        life, `listed(times)`, the number of times that its tasks are looked for from now on.
        """
        prelude = (
            "def save(step):\n"
            f"    name = f'step-{{step:08d}}'\n"
            f"    os.makedirs('{self.run}/checkpoints', exist_ok=True)\n"
            f"    os.rename(f'{self.folder}/{{name}}', f'{self.run}/checkpoints/{{name}}')\n"
            "def outcome(word, reason=None, detail='', retry=True, **more):\n"
            "    found = dict(outcome=word, reason=reason, detail=detail, retry=retry, **more)\n"
            "    text = json.dumps(found)\n"
            f"    with open('{self.run}/outcome.tmp', 'w') as stream:\n"
            "        stream.write(text)\n"
            f"    os.rename('{self.run}/outcome.tmp', '{self.run}/outcome.json')\n"
            "def until(file):\n"
            "    while not os.path.exists(f'{at}/{file}'):\n"
            "        time.sleep(0.01)\n"
            "def told(event, times=1):\n"
            "    while True:\n"
            f"        with open('{self.run}/launch/lives.jsonl') as stream:\n"
            '            if stream.read().count(f\'"event": "{event}"\') >= times:\n'
            "                return\n"
            "        time.sleep(0.01)\n"
            "def listed(times):\n"
            "    wanted = read('calls.jsonl').count('listpids') + times\n"
            "    while read('calls.jsonl').count('listpids') < wanted:\n"
            "        time.sleep(0.01)\n"
        )
        for step in (5, 10):
            if not (self.folder / f"step-{step:08d}").exists():
                checkpoint(self.folder, step)
        self.write("ranks.py", prelude + code)

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of all calls of a command."""
        return [arguments for called, arguments, _ in self._calls() if called == name]

    def surroundings(self, name: str) -> list[dict[str, Any]]:
        """Return some variables of all calls of a command, and whether it ignored SIGTERM."""
        return [variables for called, _, variables in self._calls() if called == name]

    def training(self) -> list[list[str]]:
        """Return the training steps that were started."""
        return [call for call in self.calls("srun") if "train" in call]

    def _calls(self) -> list[Any]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
