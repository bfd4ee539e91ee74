"""Starts on this machine: commands, refusals, signals that reach the ranks, exit codes."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launch_fakes import ROOT, RUN_FILE, Fake, make_fake

from launcher import cli
from launcher.addresses import own_address, parse_endpoint
from launcher.commands import Endpoint, deepspeed_over_ssh_command
from launcher.hostfile import read_hostfile
from mpotrain.errors import EXIT_BAD_INPUT, EXIT_STOPPED, ConfigError

STOPPED = json.dumps({"outcome": "resume", "reason": "SIGUSR1", "exit_code": 85, "step": 3})


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "c.toml").write_text("ranks_per_node = 2\npython = '/opt/python'\n")
    (tmp_path / "hosts").write_text("a slots=2  # first\n\n# none\nb slots=2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Started:
    """`python -m launcher ...` in a process of its own, with a fake launcher of ranks."""

    def __init__(self, desk: Path, *arguments: str, outcome: str = STOPPED) -> None:
        self.notes = desk / "notes"
        self.notes.mkdir()
        run = desk / "runs" / "small"
        run.mkdir(parents=True)
        interpreter = desk / "python"
        fake = ROOT / "tests" / "launcher" / "launcher_of_ranks.py"
        interpreter.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{fake}' \"$@\"\n")
        interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
        (desk / "c.toml").write_text(f"ranks_per_node = 2\npython = '{interpreter}'\n")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FAKE_NOTES": str(self.notes),
            "FAKE_RUN": str(run),
            "RANK": "5",
        }
        environment |= {"FAKE_OUTCOME": outcome} if outcome else {}
        command = [sys.executable, "-m", "launcher", *arguments]
        self.process = subprocess.Popen(command, cwd=desk, env=environment)

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 120
        while not all((self.notes / name).exists() for name in names):
            assert self.process.poll() is None, self.process.returncode
            assert time.monotonic() < deadline, sorted(path.name for path in self.notes.iterdir())
            time.sleep(0.02)

    def noted(self) -> set[str]:
        return {path.name for path in self.notes.iterdir()}


@pytest.fixture
def started(desk: Path) -> Iterator[list[Started]]:
    found: list[Started] = []
    yield found
    for one in found:
        if one.process.poll() is None:
            for child in psutil.Process(one.process.pid).children(recursive=True):
                child.kill()
            one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("flavour", ["torchrun", "deepspeed"])
@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (signal.SIGUSR1, "SIGUSR1"),
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGHUP, "SIGTERM"),
    ],
)
def test_signals_reach_the_ranks_alone(
    desk: Path, started: list[Started], flavour: str, sent: signal.Signals, received: str
) -> None:
    """torchrun would die of the first, DeepSpeed's launcher of all, and leave ranks behind."""
    one = Started(desk, flavour, "run.toml", "--cluster", "c.toml")
    started.append(one)
    one.wait_for("rank0-ready", "rank1-ready")
    one.process.send_signal(sent)
    assert one.process.wait(120) == EXIT_STOPPED  # and not 1, as the launcher says
    noted = one.noted()
    assert {f"rank0-{received}", f"rank1-{received}"} <= noted
    assert not [name for name in noted if name.startswith("launcher")]


def test_under_nohup_ranks_outlive_the_terminal(
    desk: Path, started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        one = Started(desk, "torchrun", "run.toml", "--cluster", "c.toml")
    finally:
        signal.signal(signal.SIGHUP, before)
    started.append(one)
    one.wait_for("rank0-ready", "rank1-ready")
    one.process.send_signal(signal.SIGHUP)
    one.process.send_signal(signal.SIGUSR1)  # comes second
    assert one.process.wait(120) == EXIT_STOPPED
    assert {"rank0-SIGUSR1", "rank1-SIGUSR1"} <= one.noted()
    assert not [name for name in one.noted() if name.endswith("-SIGTERM")]


@pytest.fixture
def pdsh(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("PATH", f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}")
    make_fake(desk / "bin", "ssh")
    return make_fake(desk / "bin", "pdsh")


@pytest.mark.parametrize(
    "command",
    [["local"], ["torchrun"], ["deepspeed"], ["deepspeed", "--hostfile", "hosts"]],
    ids=str,
)
@pytest.mark.usefixtures("pdsh")
def test_notes_of_the_plan_are_told(
    desk: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "c.toml").write_text("gpus_per_node = 1\n")
    assert cli.main([*command, "run.toml", "--cluster", "c.toml", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert told.err.count("which would have nothing to do") == 1
    assert "note: engine.device: " in told.err
    assert "note: " not in told.out


@pytest.mark.usefixtures("pdsh")
def test_ranks_on_other_hosts_are_stopped_by_file(desk: Path, started: list[Started]) -> None:
    one = Started(desk, "deepspeed", "run.toml", "--cluster", "c.toml", "--hostfile", "hosts")
    started.append(one)
    one.wait_for("launcher-ready")
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(120) == EXIT_STOPPED
    assert (desk / "runs/small/stop").exists()
    assert "launcher-SIGTERM" not in one.noted()


def test_a_launcher_does_not_outlive_its_starter(desk: Path, started: list[Started]) -> None:
    one = Started(desk, "torchrun", "run.toml", "--cluster", "c.toml")
    started.append(one)
    one.wait_for("rank0-ready", "rank1-ready")
    one.process.kill()
    deadline = time.monotonic() + 120
    while "launcher-SIGTERM" not in one.noted():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_old_outcome_is_not_taken_for_a_new_one(desk: Path, started: list[Started]) -> None:
    one = Started(desk, "torchrun", "run.toml", "--cluster", "c.toml", outcome="")
    started.append(one)
    old = desk / "runs/small/outcome.json"
    old.write_text(STOPPED)
    os.utime(old, (1e9, 1e9))
    one.wait_for("rank0-ready", "rank1-ready")
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(120) == 1


def test_local_becomes_the_run(desk: Path) -> None:
    fake = make_fake(desk / "bin", "python", code=85)
    (desk / "c.toml").write_text(
        f"cpus_per_rank = 3\npython = '{fake.path}'\nenvironment = {{ A = '$(x) y' }}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "local", "run.toml", "--cluster", "c.toml", "seed=1 2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_BAD_INPUT  # `seed` is no key
    assert fake.calls() == []
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "local", "run.toml", "--cluster", "c.toml", "name=1 2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1"},
    )
    assert process.wait(120) == 85
    (call,) = fake.calls()
    assert call["argv"] == ["-m", "mpotrain", "train", str(desk / "run.toml"), "name=1 2"]
    assert call["environment"]["A"] == "$(x) y"
    assert call["environment"]["OMP_NUM_THREADS"] == "3"
    assert "RANK" not in call["environment"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["local", "--cluster", "c.toml"], "`local` starts one process"),
        (["torchrun"], "--ranks-per-node"),
        (["deepspeed"], "--ranks-per-node"),
        (["torchrun", "--ranks-per-node=3"], "with 3 ranks: train.global_batch_size"),
        (["torchrun", "--ranks-per-node=2", "--nodes=2"], "--master"),
        (["torchrun", "--ranks-per-node=2", "--nodes=0"], "--nodes"),
        (["torchrun", "--ranks-per-node=2", "--max-restarts=-1"], "--max-restarts"),
        (
            ["torchrun", "--ranks-per-node=2", "--nodes=2", "--master=a", "--node-rank=2"],
            "--node-rank: 2 is not in 0 ... 1",
        ),
        (["torchrun", "--ranks-per-node=2", "--nodes=2", "--master=a b:1"], "--master: 'a b:1'"),
        (["deepspeed", "--hostfile=hosts", "--node-rank=2"], "--node-rank: 2"),
        (["deepspeed", "--hostfile=hosts", "--ranks-per-node=2"], "--ranks-per-node"),
        (["torchrun", "--ranks-per-node=0"], "--ranks-per-node: must be at least 1, is 0"),
        (["torchrun", "--ranks-per-node=-2"], "--ranks-per-node: must be at least 1, is -2"),
        (["torchrun", "--ranks-per-node=0", "--nodes=0"], "2 problems"),
        (["deepspeed", "--ranks-per-node", "-1"], "--ranks-per-node: must be at least 1, is -1"),
        (["deepspeed", "--hostfile=none"], "none: the hostfile does not exist"),
        (["deepspeed", "--hostfile=."], ".: cannot be read: Is a directory"),
        (["local", "--cluster", "none"], "none: does not exist; name a cluster file"),
        (["torchrun", "--cluster", "c.toml", "engine.device=cuda"], "engine.device"),
        (["deepspeed", "--hostfile=hosts", "name=$(touch pwned)"], "would be read by a shell"),
        (["deepspeed", "--cluster", "c.toml", "folder="], "folder: is empty"),
    ],
)
def test_refused_starts(
    desk: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flavour, *options = arguments
    assert cli.main([flavour, "run.toml", *options]) == EXIT_BAD_INPUT
    assert expected in capsys.readouterr().err
    assert not (desk / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [["local"], ["torchrun", "--cluster=c.toml"], ["deepspeed", "--cluster=c.toml"]],
    ids=lambda arguments: arguments[0],
)
def test_a_stop_file_is_no_silent_end(
    desk: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ranks would save, delete the file and leave with 85 before their first step."""
    flavour, *options = arguments
    started = []
    monkeypatch.setattr("launcher.start_local.run_in_place", started.append)
    for module in ("start_torchrun", "start_deepspeed"):
        monkeypatch.setattr(f"launcher.{module}.run_and_pass", lambda *given: started.append(given))
    stop = desk / "runs" / "small" / "stop"
    stop.parent.mkdir(parents=True)
    stop.touch()
    assert cli.main([flavour, "run.toml", *options]) == EXIT_BAD_INPUT
    told = capsys.readouterr().err
    assert f"{stop}: the stop file is there" in told
    assert f"stop --undo {stop.parent}" in told
    assert cli.main([flavour, "run.toml", *options, "--dry-run"]) == EXIT_BAD_INPUT
    told = capsys.readouterr()
    assert "mpotrain train" in told.out.replace("\\\n   ", "")
    assert "stop file" in told.err
    assert started == []
    assert stop.exists()


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
def test_missing_pdsh_is_told(
    dry: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["deepspeed", "run.toml", "--hostfile=hosts", *dry]) == EXIT_BAD_INPUT
    told = capsys.readouterr()
    assert "pdsh is not installed here" in told.err
    assert ("deepspeed.launcher.runner" in told.out) == bool(dry)


def test_one_other_host_is_not_taken_for_this_one(desk: Path, pdsh: Fake) -> None:
    """DeepSpeed's own runner starts the ranks here where a hostfile has one line."""
    (desk / "hosts").write_text("elsewhere slots=1\n")
    command = deepspeed_over_ssh_command(
        # A module that does no harm where it is started here.
        sys.executable, ("platform",), hostfile="hosts", master=Endpoint("elsewhere", 29500)
    )  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (call,) = pdsh.calls()
    assert call["argv"][call["argv"].index("-w") + 1] == "elsewhere"
    assert "deepspeed.launcher.launch" in call["argv"]


def test_pyxis_is_a_thing_of_srun(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "c.toml").write_text("container = { kind = 'pyxis', image = 'i' }\n")
    assert cli.main(["torchrun", "run.toml", "--cluster", "c.toml"]) == EXIT_BAD_INPUT
    assert "container.kind" in capsys.readouterr().err


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out.replace("\\\n", "").split()


@pytest.mark.usefixtures("pdsh")
def test_dry_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run.toml", "--cluster", "c.toml"]
    words = shown(capsys, "torchrun", *run, "train.steps=70", "--max-restarts=2")
    assert words[-6:] == [
        "--max-restarts=2", "-m", "launcher.rank", "train", f"{desk}/run.toml", "train.steps=70",
    ]  # fmt: skip
    assert "--standalone" in words
    words = shown(capsys, "torchrun", *run, "--nodes=2", "--node-rank=1", "--master=127.0.0.1:99")
    assert {"--rdzv-endpoint=127.0.0.1:99", "--rdzv-id=small", "--rdzv-conf=is_host=0"} <= set(
        words
    )
    assert "--local-addr=127.0.0.1" in words
    words = shown(capsys, "deepspeed", *run)
    assert {"deepspeed.launcher.launch", "--master_addr=127.0.0.1"} <= set(words)
    words = shown(capsys, "deepspeed", *run, "--hostfile=hosts", "--node-rank=1", "--master=c:1")
    assert {"--node_rank=1", "--master_addr=c", "--master_port=1"} <= set(words)
    words = shown(capsys, "deepspeed", *run, "--hostfile=hosts")
    assert {"deepspeed.launcher.runner", f"--hostfile={desk}/hosts"} <= set(words)
    words = shown(capsys, "local", "run.toml")
    assert words[-4:] == ["-m", "mpotrain", "train", f"{desk}/run.toml"]
    assert not (desk / "runs").exists()


def test_hostfiles(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node-1.a slots=8\n10.0.0.2   slots=4 # half\n")
    assert list(read_hostfile(path).items()) == [("node-1.a", 8), ("10.0.0.2", 4)]
    path.write_text("a\nb slots=0\nc slots=2\nc slots=2\n$(touch x) slots=1\n-x slots=1\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert [line.split(": ")[1] for line in caught.value.problems] == [
        "line 1", "line 2", "line 4", "line 5", "line 6",
    ]  # fmt: skip
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", Endpoint("host", 29500)),
        ("10.0.0.1:80", Endpoint("10.0.0.1", 80)),
        ("[fd00::1]:80", Endpoint("fd00::1", 80)),
        ("[fd00::1]", Endpoint("fd00::1", 29500)),
    ],
)
def test_endpoints(text: str, expected: Endpoint) -> None:
    assert parse_endpoint(text) == expected
    assert parse_endpoint(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "a:", "a:0", "a:65536", "a:b", "fd00::1", "-a:1", "a b", "$x"]
)
def test_wrong_endpoints(text: str) -> None:
    with pytest.raises(ConfigError, match="--master"):
        parse_endpoint(text)


def test_own_address_is_the_one_on_the_way_to_the_other() -> None:
    assert own_address(Endpoint("127.0.0.1", 9)) == "127.0.0.1"
    assert own_address(Endpoint("no such host", 9)) is None
    with socket.socket() as listening:  # nothing is sent, so nothing needs to listen
        listening.bind(("127.0.0.2", 0))
        assert own_address(Endpoint("127.0.0.2", listening.getsockname()[1])) is not None
