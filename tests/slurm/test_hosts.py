"""Launchers without SLURM over hosts of the lab, each with its own network, processes and name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from run_process import prepare_markov
from slurm.cluster_faults import ranks_of
from slurm.lab_fixture import PROGRAM, SlurmLab
from slurm.scenario import ROOT, RUN, STEPS, Scenario, full

HOSTS = ("node1", "node2")


class Hosts:
    """A run that is started by hand on two hosts."""

    def __init__(self, lab: SlurmLab, folder: Path, data: Path) -> None:
        self.scenario = Scenario(lab, folder, data)
        self.started: list[subprocess.Popen[bytes]] = []
        # The address, as every host can reach it: names of the lab resolve inside alone.
        self.first = lab.exec(HOSTS[0], ["hostname", "-i"]).stdout.split()[0]

    def start(self, host: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Run `python -m launcher` on a host."""
        lab = self.scenario.lab
        argv = [sys.executable, str(PROGRAM), "--dir", str(lab.folder), "exec", host, "--"]
        command = [sys.executable, "-m", "launcher", *arguments]
        environment = lab.environment({"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"})
        with (self.scenario.root / f"{host}.log").open("wb") as log:
            process = subprocess.Popen(
                [*argv, *command], env=environment, cwd=self.scenario.root, stdout=log, stderr=log
            )
        self.started.append(process)
        return process

    def logs(self) -> str:
        """Return what all hosts wrote."""
        return "\n".join(p.read_text(errors="replace") for p in self.scenario.root.glob("*.log"))

    def wait_until_done(self, seconds: float = 240.0) -> None:
        """Wait until every started process has ended with success."""
        end = time.monotonic() + seconds
        for process in self.started:
            code = process.wait(max(1.0, end - time.monotonic()))
            assert code == 0, self.logs()[-5000:]

    def stop(self) -> None:
        """Kill what is left."""
        for process in self.started:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                for one in [*family, psutil.Process(process.pid)]:
                    one.kill()
                process.wait()


@pytest.fixture
def hosts(fresh_lab: SlurmLab, tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(fresh_lab, tmp_path / "hosts", prepare_markov(tmp_path / "data"))
    yield made
    made.stop()


def starts(scenario: Scenario) -> int:
    """Return how often the run was begun or taken up."""
    return len((scenario.folder / "environment.jsonl").read_text().splitlines())


def test_torchrun_starts_all_hosts_anew_when_a_rank_dies(hosts: Hosts) -> None:
    scenario = hosts.scenario
    for number, host in enumerate(HOSTS):
        hosts.start(
            host, "torchrun", str(scenario.run_file), "--ranks-per-node=1", "--nodes=2",
            f"--node-rank={number}", f"--master={hosts.first}:29411", "--max-restarts=2", *RUN,
        )  # fmt: skip
    scenario.wait_for_step(60)
    os.kill(ranks_of(scenario)[-1], signal.SIGKILL)
    hosts.wait_until_done()
    assert len(scenario.curve()) == STEPS
    assert starts(scenario) == 2


@full
def test_deepspeed_with_a_hostfile_on_each_host(hosts: Hosts) -> None:
    scenario = hosts.scenario
    hostfile = scenario.root / "hosts.txt"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    for number, host in enumerate(HOSTS):
        hosts.start(
            host, "deepspeed", str(scenario.run_file), f"--hostfile={hostfile}",
            f"--node-rank={number}", f"--master={hosts.first}:29412", *RUN,
        )  # fmt: skip
    hosts.wait_until_done()
    assert len(scenario.curve()) == STEPS
    outcome = json.loads((scenario.folder / "outcome.json").read_text())
    assert outcome["outcome"] == "done"


def authorise(lab: SlurmLab, folder: Path) -> None:
    """Let root of every host into every other one, with keys that only the lab's hosts see."""
    folder.mkdir(mode=0o700)
    key, host_key = folder / "id_ed25519", folder / "host_key"
    for path in (key, host_key):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True)
    (folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    (folder / "config").write_text(
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    home = Path("~root/.ssh").expanduser()
    home.mkdir(mode=0o700, exist_ok=True)
    for host in HOSTS:
        # Mounts of a host are its own: nothing of this is seen outside of it.
        lab.exec(host, ["mount", "--bind", str(folder), str(home)])
        lab.exec(host, ["mount", "-t", "tmpfs", "tmpfs", "/run"])
        lab.exec(host, ["mkdir", "-p", "/run/sshd"])
        lab.exec(host, ["/usr/sbin/sshd", "-h", str(host_key), "-o", "PermitRootLogin=yes"])


@full
@pytest.mark.skipif(not (shutil.which("pdsh") and shutil.which("sshd")), reason="no pdsh or sshd")
def test_deepspeed_over_pdsh_and_ssh(hosts: Hosts) -> None:
    scenario = hosts.scenario
    authorise(scenario.lab, scenario.root / "ssh")
    hostfile = scenario.root / "hosts.txt"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    # What goes through the shells of the hosts must need no quoting: settings lie in a file.
    resolved = scenario.root / "resolved.toml"
    settings = [*RUN, "train.steps=60"]
    show = [sys.executable, "-m", "mpotrain", "config", "show", str(scenario.run_file), *settings]
    resolved.write_text(scenario.lab.run(show, {"PYTHONPATH": str(ROOT)}).stdout)
    hosts.start(
        HOSTS[0], "deepspeed", str(resolved), f"--hostfile={hostfile}",
        f"--master={hosts.first}:29413",
    )  # fmt: skip
    hosts.wait_until_done()
    assert len(scenario.curve()) == 60
