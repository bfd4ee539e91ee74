"""The lab is a cluster: nodes apart, faults that bite, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.lab_fixture import PATH, PROGRAM, SlurmLab, lab_folder, skip_without_lab
from slurm.scenario import full

TALK = """
import os, socket, sys, time
rank, port = int(os.environ["SLURM_PROCID"]), int(sys.argv[1])
if rank == 0:
    with socket.create_server(("", port)) as server:
        server.settimeout(20)
        connection, peer = server.accept()
        print("heard", connection.recv(100).decode())
else:
    for _ in range(200):
        try:
            connection = socket.create_connection((sys.argv[2], port), timeout=1)
            break
        except OSError:
            time.sleep(0.1)  # the other task is not there yet
    connection.sendall(socket.gethostname().encode())
"""
KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], 6818), timeout=1)"
"""Exits with an error unless the slurmd of a node accepts a connection."""
LIVES = """#!/bin/bash
echo "life ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
srun sleep 300
"""
DEAF = "trap '' TERM; while :; do sleep 1; done"
"""SLURM requeues what it had to kill for a job of higher priority, not what left by itself."""


@pytest.fixture
def job_script(tmp_path: Path) -> Path:
    """A job that notes its lives in `tmp_path / "log"` and does not end by itself."""
    path = tmp_path / "job.sh"
    path.write_text(LIVES)
    return path


def submit(lab: SlurmLab, script: Path, *options: str) -> str:
    always = ("--requeue", "--open-mode=append", f"--output={script.parent / 'log'}")
    return lab.sbatch([*always, *options, str(script)], cwd=script.parent)


def reaches(lab: SlurmLab, source: str, target: str) -> bool:
    return lab.exec(source, [sys.executable, "-c", KNOCK, target], check=False).returncode == 0


def test_every_node_is_a_machine_of_its_own(lab: SlurmLab) -> None:
    places = "hostname; readlink /proc/self/ns/net /proc/self/ns/pid; cat /proc/1/comm"
    lines = lab.run(["srun", "--nodes=4", "--label", "sh", "-c", places]).stdout.splitlines()
    nodes = [
        tuple(line.split(": ", 1)[1] for line in lines if line.startswith(f"{task}:"))
        for task in range(4)
    ]
    assert {node[0] for node in nodes} == {"node1", "node2", "node3", "node4"}
    assert len({node[1] for node in nodes}) == 4
    assert len({node[2] for node in nodes}) == 4
    assert os.readlink("/proc/self/ns/net") not in {node[1] for node in nodes}  # noqa: PTH115


def test_nodes_share_files_but_not_memory(lab: SlurmLab, tmp_path: Path) -> None:
    lab.exec("node1", ["sh", "-c", 'touch "$0/shared" /dev/shm/own "$1/own"', str(tmp_path),
                       lab.variables["LAB_LOCAL"]])  # fmt: skip
    seen = lab.exec("node2", ["ls", str(tmp_path), "/dev/shm", lab.variables["LAB_LOCAL"]]).stdout
    assert "shared" in seen
    assert "own" not in seen.split()


def test_tasks_of_two_nodes_talk(lab: SlurmLab) -> None:
    argv = ["srun", "-N2", "--ntasks-per-node=1", "-w", "node1,node2", sys.executable, "-c", TALK]
    assert lab.run([*argv, "29400", "node1"]).stdout.strip() == "heard node2"


def test_gpus_are_given_out(lab: SlurmLab) -> None:
    show = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert lab.run(["srun", "-N1", "--gres=gpu:2", *show]).stdout.strip() == "0,1"
    refused = lab.run(["srun", "-N1", "--gres=gpu:3", *show], check=False)
    assert refused.returncode != 0


@full
def test_killed_node_goes_down_and_its_job_starts_elsewhere(
    fresh_lab: SlurmLab, job_script: Path
) -> None:
    job = submit(fresh_lab, job_script, "--nodes=2", "--nodelist=node1,node2")
    fresh_lab.wait_state(job, "RUNNING")
    # The list was only to know the nodes; a life after may run anywhere.
    fresh_lab.kill("node2")
    assert not reaches(fresh_lab, "node1", "node2")
    fresh_lab.wait_node("node2", "down")
    fresh_lab.run(["scontrol", "update", f"JobId={job}", "ReqNodeList="])
    fresh_lab.wait_for(lambda: fresh_lab.restarts(job) == 1, 30, "a requeue")
    fresh_lab.wait_state(job, "RUNNING")
    assert "node2" not in fresh_lab.job(job)["NodeList"]
    fresh_lab.start("node2")
    fresh_lab.wait_node("node2", "idle")
    lives = (job_script.parent / "log").read_text()
    assert "life 0 on node[1-2]" in lives
    assert "life 1 on node" in lives


def test_cut_node_hears_nothing_until_healed(fresh_lab: SlurmLab) -> None:
    assert reaches(fresh_lab, "node1", "node2")
    fresh_lab.cut("node2")
    assert not reaches(fresh_lab, "node1", "node2")
    assert reaches(fresh_lab, "node1", "node3")
    fresh_lab.heal("node2")
    assert reaches(fresh_lab, "node1", "node2")


def test_frozen_node_stands_still_until_thawed(fresh_lab: SlurmLab) -> None:
    def states() -> set[str]:
        text = fresh_lab.exec("node3", ["ps", "-C", "slurmd", "-o", "state="]).stdout
        return set(text.split())

    fresh_lab.freeze("node3")
    assert states() == {"T"}
    fresh_lab.thaw("node3")
    assert "T" not in states()


def test_crashed_node_leaves_no_process(fresh_lab: SlurmLab) -> None:
    fresh_lab.crash("node4")
    refused = fresh_lab.exec("node4", ["true"], check=False)
    assert refused.returncode == 1
    assert "node4 is not running" in refused.stderr


def test_jobs_outlive_the_daemons(fresh_lab: SlurmLab, job_script: Path) -> None:
    job = submit(fresh_lab, job_script, "--nodes=2")
    fresh_lab.wait_state(job, "RUNNING")
    node = fresh_lab.job(job)["BatchHost"]
    fresh_lab.slurmd_kill(node)
    assert fresh_lab.exec(node, ["ps", "-C", "slurmd"], check=False).returncode != 0
    fresh_lab.ctl_restart()
    fresh_lab.slurmd_start(node)
    assert fresh_lab.wait_state(job, "RUNNING") == "RUNNING"
    assert fresh_lab.restarts(job) == 0
    assert fresh_lab.exec(node, ["pgrep", "-x", "sleep"]).stdout.strip()


def test_main_pre_empts_low(fresh_lab: SlurmLab) -> None:
    def set_grace(seconds: int) -> None:
        argv = ["scontrol", "update", "PartitionName=low", f"GraceTime={seconds}"]
        fresh_lab.run(argv)

    always = ["--nodes=4", "--exclusive", "--output=/dev/null"]
    set_grace(2)  # the default suits jobs that have a checkpoint to write
    try:
        low = fresh_lab.sbatch([*always, "--partition=low", "--requeue", "--wrap", DEAF])
        fresh_lab.wait_state(low, "RUNNING")
        high = fresh_lab.sbatch([*always, "--wrap", "sleep 1"])
        fresh_lab.wait_state(high, "COMPLETED")
        fresh_lab.wait_for(lambda: fresh_lab.restarts(low) == 1, 20, "the pre-empted job's requeue")
    finally:
        set_grace(10)


def traces(folder: Path) -> list[str]:
    """Everything of a lab that a machine could still show."""
    found = [str(path) for path in (folder, folder.with_name(folder.name + ".lock"))]
    found = [path for path in found if Path(path).exists()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{folder}/" in command or f"{folder}\0" in command:
                found.append(command.replace("\0", " "))
    links = json.loads(subprocess.check_output(["ip", "-json", "link"], env={"PATH": PATH}))
    return found + [link["ifname"] for link in links if link.get("ifalias") == str(folder)]


def interfaces() -> set[str]:
    """Names of interfaces and network namespaces of labs."""
    names = {path.name for path in Path("/sys/class/net").glob("slab*")}
    return names | {path.name for path in Path("/run/netns").glob("slab*")}


@pytest.mark.parametrize("folder_is_lost", [False, True])
def test_down_leaves_nothing_and_harms_no_other_lab(lab: SlurmLab, folder_is_lost: bool) -> None:
    folder = lab_folder("b")
    second = SlurmLab(folder, 1)
    try:
        bridge = f"slab{json.loads((folder / 'lab.json').read_text())['place']['slot']}"
        assert second.run(["srun", "hostname"]).stdout.strip() == "node1"
        assert traces(folder)
        assert {bridge, f"{bridge}n1", f"{bridge}-n1"} <= interfaces()
        if folder_is_lost:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        second.down()
    assert traces(folder) == []
    assert not {name for name in interfaces() if name in {bridge, f"{bridge}n1", f"{bridge}-n1"}}
    second.down()
    assert len(lab.run(["srun", "-N4", "hostname"]).stdout.split()) == 4


def test_up_twice_keeps_the_lab(lab: SlurmLab) -> None:
    before = (lab.folder / "lab.json").stat().st_mtime_ns
    again = SlurmLab(lab.folder, lab.num_nodes, "--gpus", "2")
    assert again.variables == lab.variables
    assert (lab.folder / "lab.json").stat().st_mtime_ns == before


def test_any_user_may_start_one_without_namespaces() -> None:
    skip_without_lab()
    folder = lab_folder("m")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    # The interpreter of the system: a virtual environment may lie where others cannot look.
    command = [*as_nobody, "/usr/bin/python3", "-B", str(PROGRAM), "--dir", str(folder)]
    readable = subprocess.run([*command, "--help"], capture_output=True, check=False)
    if readable.returncode:
        pytest.skip("another user cannot read this working tree, or has no Python")
    subprocess.run([*command, "up", "2"], check=True, capture_output=True, timeout=100)
    try:
        job = ["srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME $(id -u)"]
        variables = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        text = subprocess.check_output([*as_nobody, *job], env=variables, text=True, timeout=60)
        assert set(text.splitlines()) == {"node1 65534", "node2 65534"}
        refused = subprocess.run([*command, "cut", "node1"], capture_output=True, check=False)
        assert refused.returncode == 1
    finally:
        subprocess.run([*command, "down"], check=True, timeout=60)
    assert traces(folder) == []
