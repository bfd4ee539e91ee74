"""What the lab decides before it starts anything; needs neither SLURM nor root."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.lab_fixture import PROGRAM, lab_folder
from slurmlab import locks, processes
from slurmlab.configuration import cgroup_conf, hosts_file, slurm_conf
from slurmlab.settings import (
    LabError,
    Place,
    Settings,
    check_folder,
    read_record,
    write_record,
)


def place(folder: Path, slot: int = 7) -> Place:
    return Place(folder=folder, slot=slot, control_address=f"10.99.{slot}.254", host="here")


def run_lab(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def values(text: str, name: str) -> list[str]:
    return [line.split("=", 1)[1] for line in text.splitlines() if line.startswith(f"{name}=")]


def test_slurm_conf_holds_the_settings() -> None:
    chosen = Settings(
        num_nodes=3, gpus=2, node_timeout=9, kill_wait=4, grace=12, requeue_delay=6, extra=("X=1",)
    )
    text = slurm_conf(chosen, place(Path("/l")), user="me")
    assert values(text, "SlurmdTimeout") == ["9"]
    assert values(text, "KillWait") == ["4"]
    assert values(text, "AuthInfo")[0].endswith("cred_expire=6")
    assert [line.split()[0] for line in values(text, "NodeName")] == ["node1", "node2", "node3"]
    assert all("Gres=gpu:2" in line for line in values(text, "NodeName"))
    main, low = values(text, "PartitionName")
    assert "PriorityTier=10" in main
    assert "PreemptMode=OFF" in main
    assert "PriorityTier=1 PreemptMode=REQUEUE GraceTime=12" in low
    assert text.endswith("X=1\n")


def test_no_two_daemons_of_a_machine_share_an_address() -> None:
    seen: set[object] = set()
    for slot in range(1, 201):
        where = place(Path("/l"), slot)
        used = [where.control_port, *(where.node_port(index) for index in range(1, 32))]
        assert max(used) < 32768  # what the kernel gives out by itself starts there
        assert seen.isdisjoint(used)
        seen.update(used)
        names = {where.cable(200), where.bridge}
        assert max(map(len, names)) <= 15  # the kernel's limit
        assert seen.isdisjoint(names)
        seen.update(names)


def test_modes_tell_nodes_apart_by_address_or_port() -> None:
    apart = slurm_conf(Settings(num_nodes=2), place(Path("/l")), user="me")
    assert "NodeAddr=10.99.7.2 Port=6818" in apart
    assert "NoCtldInAddrAny" in apart
    together = slurm_conf(Settings(num_nodes=2, mode="multi"), place(Path("/l")), user="me")
    assert "NodeHostname=here NodeAddr=10.99.7.254 Port=25226" in together
    assert "10.99.7.2 node2" in hosts_file(Settings(num_nodes=2), place(Path("/l"))).splitlines()


@pytest.mark.parametrize(
    ("version", "text"),
    [((21, 8), ""), ((22, 5), "IgnoreSystemd=yes\n"), ((24, 5), "CgroupPlugin=disabled\n")],
)
def test_cgroups_are_left_alone_in_the_words_of_each_version(
    version: tuple[int, int], text: str
) -> None:
    assert cgroup_conf(version) == text


def test_all_problems_are_told_at_once() -> None:
    bad = Settings(num_nodes=32, mode="multi", requeue_delay=1, cpus=0, gpus=-1)
    assert len(bad.problems()) == 4
    assert Settings().problems() == []


def test_record_round_trip(tmp_path: Path) -> None:
    settings = Settings(num_nodes=3, extra=("A=1", "B=2"))
    write_record(settings, place(tmp_path))
    assert read_record(tmp_path) == (settings, place(tmp_path))
    (tmp_path / "lab.json").write_text('{"settings": {}}')
    with pytest.raises(LabError, match="not a lab's record"):
        read_record(tmp_path)


def test_folders_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for name in ("with space", "100%", "new\nline"):
        with pytest.raises(LabError, match="characters"):
            check_folder(Path("/tmp") / name)
    with pytest.raises(LabError, match="longer than"):
        check_folder(Path("/tmp") / ("x" * 80))


def test_folders_of_others_are_never_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurmlab.settings.MAX_FOLDER_LENGTH", 200)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LabError, match="other things"):
        check_folder(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(LabError, match="not a folder of yours"):
        check_folder(tmp_path / "link")


def test_command_line_speaks_of_mistakes() -> None:
    folder = lab_folder("none")
    refused = run_lab("--dir", str(folder), "status")
    assert refused.returncode == 1
    assert f"no lab in {folder}" in refused.stderr
    assert "Traceback" not in refused.stderr
    refused = run_lab("--dir", str(folder), "up", "0")
    assert refused.returncode == 1
    assert "0 nodes asked for" in refused.stderr
    assert not folder.exists()


def test_help_says_what_each_command_does_and_needs() -> None:
    text = run_lab("--help").stdout
    assert "docs/slurm-lab.md" in text
    commands = re.findall(r"^ {4}([a-z-]+)(?: |$)", text, re.MULTILINE)
    assert {"up", "down", "kill", "exec", "ctl-restart"} <= set(commands)
    need_root = set()
    for name in commands:
        usage, about, *_ = run_lab(name, "--help").stdout.split("\n\n")
        assert f"slurm/lab {name} " in usage
        assert about[0].isupper(), f"{name} is not described"
        if "needs root" in " ".join(about.split()):
            need_root.add(name)
    assert need_root == {"kill", "crash", "cut", "heal", "freeze", "thaw", "exec"}


def test_missing_programs_name_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurmlab.settings.shutil.which", lambda name: None)
    from slurmlab.cluster import up

    with pytest.raises(LabError, match=r"missing: slurmctld, .*install\.sh"):
        up(lab_folder("none"), Settings())


def test_lock_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.held(path):
        with pytest.raises(LabError, match="another command"), locks.held(path, seconds=0.2):
            pass
        path.unlink()
        # A lock on the deleted file would protect nothing: the next one makes its own.
        with locks.held(path, seconds=0.2):
            assert path.exists()


def test_processes_are_known_by_whole_arguments() -> None:
    # The machine is searched, so nothing else on it may have this argument.
    own = f"98.{os.getpid()}"
    child = subprocess.Popen(["sleep", f"{own}7"])
    try:
        assert processes.wait_until(lambda: bool(processes.find_program("sleep", f"{own}7")), 30)
        found = processes.find_program("sleep", f"{own}7")
        assert [process.pid for process in found] == [child.pid]
        assert not processes.find_program("sleep", own)
        assert not processes.find_program("sleeper", f"{own}7")
        processes.stop(found)
        assert child.wait(30) == -signal.SIGTERM
        assert processes.read_process(child.pid) is None
    finally:
        child.kill()


def test_stop_kills_what_is_deaf(tmp_path: Path) -> None:
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; touch \"$0\"; while :; do sleep 0.1; done",
                             str(tmp_path / "ready")])  # fmt: skip
    assert processes.wait_until((tmp_path / "ready").exists, 30)
    process = processes.read_process(deaf.pid)
    assert process is not None
    processes.stop([process], patience=0.3)
    assert deaf.wait(30) == -signal.SIGKILL


def test_a_reused_pid_is_not_signalled() -> None:
    own = f"60.{os.getpid()}"
    child = subprocess.Popen(["sleep", own])
    try:
        assert processes.wait_until(lambda: bool(processes.find_program("sleep", own)), 30)
        now = processes.read_process(child.pid)
        assert now is not None
        stale = processes.Process(now.pid, now.parent, "slurmd", ("slurmd",))
        processes.send([stale], signal.SIGKILL)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
    finally:
        child.kill()
        child.wait()
