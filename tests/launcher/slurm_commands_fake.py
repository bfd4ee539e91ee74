"""SLURM's commands as scripts on PATH that read and change one JSON file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = r"""
import fcntl, json, os, re, sys, time
here = os.path.dirname(os.path.abspath(__file__))
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
lock = open(os.path.join(here, "lock"), "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
path = os.path.join(here, "state.json")
state = json.load(open(path))
state["calls"].append([name, *args])
options = dict(a[2:].split("=", 1) if "=" in a else (a[2:], "") for a in args if a.startswith("--"))
words = [a for a in args if not a.startswith("-")]
jobs, code, out, err = state["jobs"], 0, "", ""

def named(job_id):
    return [j for j in jobs if job_id in (j["id"], j["raw"], j["id"].partition("_")[0])]

def squeue():
    found = jobs
    if "jobs" in options:
        wanted = options["jobs"].split(",")
        found = [j for i in wanted for j in named(i)]
        if not found and len(wanted) == 1:
            return 1, "", "slurm_load_jobs error: Invalid job id specified\n"
    if "name" in options:
        found = [j for j in found if j["name"] == options["name"]]
    states = options.get("states")
    active = ("PENDING", "RUNNING", "COMPLETING")
    if states == "PENDING":
        found = [j for j in found if j["state"] == "PENDING"]
    elif states != "all":
        found = [j for j in found if j["state"] in active]
    fields = {"i": "id", "A": "raw", "T": "state", "j": "name", "N": "nodes", "r": "reason",
              "E": "dependency"}
    text = "".join(re.sub("%(.)", lambda m: j[fields[m[1]]], options["format"]) + "\n"
                   for j in found)
    return 0, text, ""

def scancel():
    code, err = 0, ""
    for job_id in words:
        for j in named(job_id):
            if options.get("state") in (None, j["state"]) and j["state"] in ("PENDING", "RUNNING"):
                j["state"] = state["cancelled_becomes"]
        if not named(job_id):
            code, err = 1, "scancel: error: job id %s: Invalid job id specified\n" % job_id
    return code, "", err

def sbatch():
    if "test-only" in options:
        return 0, "", "sbatch: Job 1 to start at 2026-01-01T00:00:00\n"
    if state["sbatch_left"] == 0:
        return 1, "", "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
    state["sbatch_left"] -= 1
    job_id = str(state["next_id"])
    state["next_id"] += 1
    state["environments"].append(dict(os.environ))
    tasks = [None]
    if "array" in options:
        first, last = options["array"].partition("%")[0].split("-")
        tasks = range(int(first), int(last) + 1)
    for task in tasks:
        raw = job_id if not task else str(state["next_id"] + task)
        jobs.append({"id": job_id if task is None else "%s_%d" % (job_id, task), "raw": raw,
                     "state": "PENDING", "name": options.get("job-name", ""), "nodes": "",
                     "reason": "Priority", "dependency": options.get("dependency", "(null)"),
                     "stdout": options.get("output", "")})
    return 0, job_id + "\n", ""

def scontrol():
    for j in named(words[-1]):
        line = "JobId=%s JobName=%s JobState=%s StdErr=%s StdIn=/dev/null StdOut=%s Power= \n"
        return 0, line % (j["raw"], j["name"], j["state"], j["stdout"], j["stdout"]), ""
    return 1, "", "slurm_load_jobs error: Invalid job id specified\n"

trouble = state["trouble"].get(name)
if trouble == "hang":
    time.sleep(60)
if trouble:
    code, out, err = 1, "", trouble + "\n"
else:
    code, out, err = {"squeue": squeue, "scancel": scancel, "sbatch": sbatch,
                      "scontrol": scontrol}[name]()
# What happens on the cluster right after a command: {command: [changes of its 1st, 2nd, ... call]}
after = state["after"].get(name, [])
if after:
    for change in after.pop(0):
        old = [j for j in jobs if j["id"] == change["id"]]
        if old:
            old[0].update(change)
        else:
            jobs.append(change)
json.dump(state, open(path, "w"))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class FakeSlurm:
    """The queue behind the scripts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._state = folder / "state.json"
        folder.mkdir()
        script = folder / "command.py"
        script.write_text(f"#!{sys.executable} -SE\n{SCRIPT}")
        script.chmod(0o755)
        for name in ("squeue", "scancel", "sbatch", "scontrol"):
            (folder / name).symlink_to(script)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        self.write(
            {
                "jobs": [], "calls": [], "trouble": {}, "after": {}, "next_id": 500,
                "environments": [], "sbatch_left": -1, "cancelled_becomes": "CANCELLED",
            }
        )  # fmt: skip

    def write(self, state: dict[str, Any]) -> None:
        self._state.write_text(json.dumps(state))

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._state.read_text())
        return found

    def set(self, **entries: Any) -> None:
        self.write(self.state | entries)

    def add(self, job_id: str, state: str, **entries: str) -> None:
        self.set(jobs=[*self.state["jobs"], job(job_id, state, **entries)])

    def update(self, job_id: str, **entries: str) -> None:
        jobs = self.state["jobs"]
        for one in jobs:
            if one["id"] == job_id:
                one.update(entries)
        self.set(jobs=jobs)

    def job_state(self, job_id: str) -> str:
        return next(str(one["state"]) for one in self.state["jobs"] if one["id"] == job_id)

    def calls(self, name: str) -> list[list[str]]:
        return [call for call in self.state["calls"] if call[0] == name]


def job(job_id: str, state: str, **entries: str) -> dict[str, str]:
    """Return a job as the scripts keep it."""
    plain = {"raw": job_id, "name": "demo", "nodes": "", "reason": "None"}
    plain |= {"dependency": "(null)", "stdout": "/dev/null"}
    return {"id": job_id, "state": state, **plain, **entries}


def make_run(
    folder: Path,
    *,
    job_id: str | None = None,
    steps: int = 100,
    lives: list[dict[str, Any]] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    outcome: dict[str, Any] | None = None,
) -> Path:
    """Write a run folder as the launcher and the trainer leave it."""
    launch = folder / "launch"
    launch.mkdir(parents=True)
    (launch / "run.toml").write_text(f'name = "demo"\n[train]\nsteps = {steps}\n')
    if job_id is not None:
        submission = {"job_id": job_id, "time": 1000.0, "host": "login"}
        (launch / "submission.json").write_text(json.dumps(submission))
    write_lines(launch / "lives.jsonl", lives or [])
    write_lines(folder / "metrics.jsonl", metrics or [])
    if outcome is not None:
        (folder / "outcome.json").write_text(json.dumps(outcome))
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    if records:
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def train_line(step: int, **entries: Any) -> dict[str, Any]:
    line = {"step": step, "kind": "train", "time": 2000.0 + step, "loss": 5 - step / 100}
    return {**line, "tokens_per_second": 12_345.6, **entries}
