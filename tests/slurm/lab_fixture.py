"""A SLURM lab for tests: `lab` starts it once a session, `fresh_lab` mends it after the test."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "slurm" / "lab"
NUM_NODES = 4
NUM_GPUS = 2
"""Pretended GPUs of each node; jobs that ask for none do not notice."""
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
FINAL = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
)
"""States of a job that nothing follows but a requeue."""
Text = subprocess.CompletedProcess[str]


class SlurmLab:
    """A running lab, with its nodes node1 .. nodeN and ways to break them.

    Attributes:
        folder: of the lab; `folder / "log"` has the logs of the daemons.
        num_nodes: how many nodes there are.
        variables: what makes SLURM's commands talk to this lab.
    """

    def __init__(self, folder: Path, num_nodes: int = NUM_NODES, *options: str) -> None:
        self.folder = folder
        self.num_nodes = num_nodes
        text = self._lab("up", str(num_nodes), *options).stdout
        words = [word for line in text.splitlines() for word in shlex.split(line)[1:]]
        self.variables = dict(word.split("=", 1) for word in words)

    def down(self) -> None:
        """Take the lab away."""
        self._lab("down")

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return this process's environment, pointed to the lab and changed by `env`."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return own | {"PATH": PATH} | self.variables | dict(env or {})

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 120.0,
    ) -> Text:
        """Run a command on the "login node" (this machine) and return what it wrote."""
        return _run(argv, self.environment(env), cwd=cwd, check=check, timeout=timeout)

    def sbatch(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, cwd: Path | None = None
    ) -> str:
        """Submit a job (options, script, arguments) and return its id."""
        text = self.run(["sbatch", "--parsable", *argv], env, cwd=cwd).stdout
        return text.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of `scontrol show job` for one job."""
        text = self.run(["scontrol", "-o", "show", "job", job_id]).stdout
        return dict(re.findall(r"(?:^|\s)([A-Za-z:/_]+)=(\S*)", text))

    def job_state(self, job_id: str) -> str:
        """Return the state of a job, such as RUNNING."""
        return self.job(job_id)["JobState"]

    def restarts(self, job_id: str) -> int:
        """Return how often SLURM has requeued a job."""
        return int(self.job(job_id)["Restarts"])

    def wait_state(self, job_id: str, *states: str, seconds: float = 60.0) -> str:
        """Wait until a job is in one of `states`; return which.

        A job that ends in another state fails the test at once.
        """
        now = ""

        def reached() -> bool:
            nonlocal now
            now = self.job_state(job_id)
            return now in states or now in FINAL

        self.wait_for(reached, seconds, f"job {job_id} to become {' or '.join(states)}")
        if now not in states:
            pytest.fail(f"job {job_id} became {now}, not {' or '.join(states)}\n{self.report()}")
        return now

    def wait_node(self, node: str, *states: str, seconds: float = 60.0) -> str:
        """Wait until a node's state (as `node_state` returns it) is one of `states`."""
        wanted = f"{node} to become {' or '.join(states)}"
        self.wait_for(lambda: self.node_state(node) in states, seconds, wanted)
        return self.node_state(node)

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll `condition`; fail the test with the queue's state where it stays false.

        Commands that fail meanwhile (slurmctld is restarting) only count as "not yet".
        """
        end = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                pass
            if time.monotonic() > end:
                pytest.fail(f"waited {seconds:.0f} s for {what}\n{self.report()}")
            time.sleep(0.2)

    def queue(self) -> dict[str, str]:
        """Return the state of every pending or running job by its id."""
        lines = self.run(["squeue", "--noheader", "--format=%i %T"]).stdout.splitlines()
        pairs = (line.split() for line in lines)
        return {pair[0]: pair[1] for pair in pairs}

    def node_state(self, node: str) -> str:
        """Return the state of a node in lower case: idle, mixed, allocated, completing, down ...

        Not from sinfo, whose view may lag for a minute where a job ended in the second of the
        look before (SLURM 22.05 compares times in whole seconds).
        """
        text = self.run(["scontrol", "-o", "show", "node", node]).stdout
        base, *flags = re.findall(r"State=(\S+)", text)[0].lower().split("+")
        return "completing" if "completing" in flags else str(base).rstrip("*")

    def report(self) -> str:
        """Return nodes and queue for a message."""
        return _run([*self._program(), "status"], self.environment(), check=False).stdout

    def exec(self, node: str, argv: Sequence[str], *, check: bool = True) -> Text:
        """Run a command inside a node, beside SLURM."""
        return self._lab("exec", node, "--", *argv, check=check)

    def kill(self, node: str) -> None:
        """Cut a node's power."""
        self._lab("kill", node)

    def crash(self, node: str) -> None:
        """Kill every process of a node while its network stays."""
        self._lab("crash", node)

    def start(self, node: str) -> None:
        """Boot a node that was killed or crashed."""
        self._lab("start", node)

    def cut(self, node: str) -> None:
        """Unplug a node's network cable."""
        self._lab("cut", node)

    def heal(self, node: str) -> None:
        """Plug a node's network cable in."""
        self._lab("heal", node)

    def freeze(self, node: str) -> None:
        """Stop every process of a node."""
        self._lab("freeze", node)

    def thaw(self, node: str) -> None:
        """Let a frozen node go on."""
        self._lab("thaw", node)

    def slurmd_kill(self, node: str) -> None:
        """Kill the slurmd of a node alone."""
        self._lab("slurmd-kill", node)

    def slurmd_start(self, node: str) -> None:
        """Start the slurmd of a node again."""
        self._lab("slurmd-start", node)

    def ctl_restart(self, signal: str = "TERM") -> None:
        """Stop slurmctld with TERM or KILL and start it again."""
        self._lab("ctl-restart", signal)

    def mend(self) -> None:
        """Undo every fault that was played."""
        self._lab("mend")

    def restore(self, seconds: float = 90.0) -> None:
        """Mend every fault, cancel every job and wait until all nodes are idle."""
        self.mend()
        for job_id in self.queue():
            # All at once and batch script included: nobody is left to requeue the job.
            self.run(["scancel", "--full", "--signal=KILL", job_id], check=False)
            self.run(["scancel", job_id], check=False)
        self.wait_for(lambda: not self.queue(), seconds, "the queue to become empty")
        for index in range(1, self.num_nodes + 1):
            self.wait_node(f"node{index}", "idle", seconds=seconds)

    def _program(self) -> list[str]:
        return [sys.executable, str(PROGRAM), "--dir", str(self.folder)]

    def _lab(self, *arguments: str, check: bool = True) -> Text:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LAB_")}
        return _run([*self._program(), *arguments], environment, check=check)


def _run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: Path | None = None,
    check: bool = True,
    timeout: float = 180.0,
) -> Text:
    done = subprocess.run(
        list(argv),
        env=dict(environment),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if check and done.returncode:
        error = subprocess.CalledProcessError(done.returncode, argv, done.stdout, done.stderr)
        error.add_note(done.stdout + done.stderr)
        raise error
    return done


def why_no_lab() -> str | None:
    """Return why this machine can start no lab with namespaces, or None if it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}; run slurm/lab/install.sh as root"
    if os.geteuid() != 0:
        return "virtual nodes with namespaces need root"
    # In a network namespace that ends with the command, so that nothing is left.
    apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc"]
    probe = ["ip", "link", "add", "slabprobe", "type", "bridge"]
    done = _run([*apart, *probe], os.environ | {"PATH": PATH}, check=False)
    if done.returncode:
        return f"namespaces or bridges are not allowed here: {done.stderr.strip()}"
    return None


def skip_without_lab() -> None:
    """Skip the test where no lab can be; fail it in continuous integration."""
    reason = why_no_lab()
    if reason is None:
        return
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"continuous integration must run the SLURM lab: {reason}")
    pytest.skip(f"SLURM lab: {reason}")


def lab_folder(name: str = "") -> Path:
    """Return a short folder of this process's own; pytest's own are too long for sockets."""
    return Path(tempfile.gettempdir()) / f"slurm-lab-test-{os.getpid()}{name}"


def _clear_orphans() -> None:
    # Labs of test runs that were killed before they could take them down.
    for folder in Path(tempfile.gettempdir()).glob("slurm-lab-test-*"):
        match = re.fullmatch(r"slurm-lab-test-(\d+)\w*", folder.name)
        if match and not Path("/proc", match[1]).exists():
            command = [sys.executable, str(PROGRAM), "--dir", str(folder), "down"]
            _run(command, os.environ, check=False)


@pytest.fixture(scope="session")
def lab() -> Iterator[SlurmLab]:
    """A cluster of four virtual nodes, shared by all tests of the session."""
    skip_without_lab()
    _clear_orphans()
    started = SlurmLab(lab_folder(), NUM_NODES, "--gpus", str(NUM_GPUS))
    yield started
    started.down()


@pytest.fixture
def fresh_lab(lab: SlurmLab) -> Iterator[SlurmLab]:
    """The shared lab, whole and empty again after the test, whatever it did."""
    yield lab
    lab.restore()
