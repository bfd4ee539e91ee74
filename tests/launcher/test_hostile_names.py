"""Names that a shell would do something with reach programs as they are, and no shell at all.

The batch scripts run under a real bash, in a folder where everything that a shell could be tricked
into leaves a file `pwned` behind.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from launch_fakes import CLUSTER_FILE, ROOT, RUN_FILE, make_fake

from launcher import cli
from launcher.cluster import ClusterConfig
from launcher.commands import Command
from launcher.dry_run import shell_text
from launcher.job import JobFacts
from launcher.remote_shell import dropped_variables, remote_problems
from launcher.slurm_commands import step_command
from mpotrain.errors import EXIT_BAD_INPUT

HOSTILE = [
    "plain",
    "two words",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "a' ; touch pwned #",
    'a" ; touch pwned #',
    "&& touch pwned",
    "| touch pwned",
    "> pwned",
    "${IFS}touch${IFS}pwned",
    "a\ntouch pwned",
    "*",
    "~",
    "!!",
    "ünï 模型",
    "\\",
    "%j %x",
    "",
]
"""Arguments; none begins with a dash."""
DASHED = ["-x", "--wrap=touch pwned", "--", "-"]


def environment(bin_folder: Path, **more: str) -> dict[str, str]:
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    found = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}
    found.pop("OMP_NUM_THREADS", None)  # a test runner may have its own
    return found


@pytest.mark.parametrize(
    ("script", "before"),
    [
        ("train", ["-m", "launcher", "batch"]),
        ("prepare_data", ["-m", "mpotrain", "prepare", "--workers=3"]),
    ],
)
def test_scripts_pass_arguments_on(tmp_path: Path, script: str, before: list[str]) -> None:
    fake = make_fake(tmp_path / "a bin", "my python")
    subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{script}.sbatch"), *HOSTILE, *DASHED],
        cwd=tmp_path,
        env=environment(tmp_path, MPOTRAIN_PYTHON=str(fake.path), SLURM_CPUS_PER_TASK="3"),
        check=True,
    )
    probe, call = fake.calls()
    assert probe["argv"][0] == "-c"
    assert call["argv"] == [*before, *HOSTILE, *DASHED]
    assert not (tmp_path / "pwned").exists()


def test_evaluation_passes_arguments_on(tmp_path: Path) -> None:
    srun = make_fake(tmp_path / "bin", "srun")
    python = str(make_fake(tmp_path / "a b", "python").path)
    subprocess.run(
        ["bash", str(ROOT / "slurm" / "evaluate.sbatch"), *HOSTILE, *DASHED],
        cwd=tmp_path,
        env=environment(tmp_path / "bin", MPOTRAIN_PYTHON=python, SLURM_CPUS_PER_TASK="3"),
        check=True,
    )
    (call,) = srun.calls()
    options = ["--cpus-per-task=3", "--kill-on-bad-exit=1"]
    assert call["argv"] == [*options, python, "-m", "mpotrain", "eval", *HOSTILE, *DASHED]
    assert call["environment"]["OMP_NUM_THREADS"] == "3"
    assert not (tmp_path / "pwned").exists()


def test_modules_are_words_and_nothing_else(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "bin", "python3")
    loaded = tmp_path / "loaded"
    function = '() {  printf "%s\\n" "$@" >>"$LOADED"\n}'
    subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), "run"],
        cwd=tmp_path,
        env=environment(
            tmp_path / "bin",
            MPOTRAIN_MODULES="cuda/12.8 $(touch pwned) * `touch pwned`",
            LOADED=str(loaded),
            **{"BASH_FUNC_module%%": function},
        ),
        check=True,
    )
    words = ["load", "cuda/12.8", "$(touch", "pwned)", "*", "`touch", "pwned`"]
    assert loaded.read_text().splitlines() == words
    assert fake.calls()[-1]["argv"] == ["-m", "launcher", "batch", "run"]
    assert not (tmp_path / "pwned").exists()


def test_failing_module_ends_the_job(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "bin", "python3")
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), "run"],
        cwd=tmp_path,
        env=environment(
            tmp_path / "bin",
            MPOTRAIN_MODULES="none/1.0",
            **{"BASH_FUNC_module%%": "() {  return 1\n}"},
        ),
        check=False,
    )
    assert done.returncode in (1, 2)
    assert fake.calls() == []


@pytest.mark.parametrize("flavour", ["srun", "torchrun", "deepspeed"])
def test_steps_pass_arguments_and_variables_on(tmp_path: Path, flavour: str) -> None:
    srun = make_fake(tmp_path / "bin", "srun")
    values = {f"V{index}": value for index, value in enumerate([*HOSTILE, *DASHED])}
    cluster = ClusterConfig(nodes=2, launcher=flavour, python="/a b/$(x)", environment=values)
    job = JobFacts("1", 0, ("node1", "node2"), "10.0.0.1", 20_000, "/home/me")
    command = step_command(cluster, "train", "/r $(touch pwned)", HOSTILE, job)
    env = {**environment(tmp_path / "bin"), **command.environment}
    subprocess.run(command.argv, cwd=tmp_path, env=env, check=True)
    (call,) = srun.calls()
    assert call["argv"] == list(command.argv[1:])
    assert call["argv"][-len(HOSTILE) - 1 :] == ["/r $(touch pwned)", *HOSTILE]
    assert {name: call["environment"][name] for name in values} == values
    assert not (tmp_path / "pwned").exists()


def toml(text: str) -> str:
    return json.dumps(text)


@pytest.mark.parametrize("text", [text for text in [*HOSTILE, *DASHED] if text])
def test_from_the_command_line_to_the_supervisor(
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole way: CLI, sbatch (which runs the script under bash), interpreter of the job."""
    bins = tmp_path / "bin"
    sbatch = make_fake(bins, "sbatch", output="1\n")
    python = make_fake(bins, "job python")
    name, folder = f"n{text}", f"runs/f{text}"
    # sbatch takes no file name with a backslash or a line end: such a folder is refused.
    refused = "\\" in text or "\n" in text
    (tmp_path / "run.toml").write_text(RUN_FILE.replace('name = "small"', f"name = {toml(name)}"))
    account = text.replace("\n", " ")
    (tmp_path / "c.toml").write_text(
        CLUSTER_FILE.replace('"/opt/python"', toml(str(python.path)))
        + f"account = {toml(account)}\n[environment]\nE = {toml(text)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", environment(bins)["PATH"])
    arguments = ["slurm", "run.toml", "--cluster", "c.toml", f"--name={text}"]
    code = cli.main([*arguments, f"folder={toml(folder)}"])
    if refused:
        assert code == EXIT_BAD_INPUT
        assert "folder: " in capsys.readouterr().err
        assert sbatch.calls() == []
        return
    assert code == 0, capsys.readouterr().err
    (call,) = sbatch.calls()
    assert f"--account={account}" in call["argv"]
    log = (tmp_path / folder).as_posix().replace("%", "%%") + "/logs/%j.log"
    assert f"--output={log}" in call["argv"]
    script = call["argv"].index(str(ROOT / "slurm" / "train.sbatch"))
    assert all(option.startswith("--") for option in call["argv"][:script])
    # What SLURM does: it runs the script with its arguments in the job's environment.
    subprocess.run(
        ["bash", *call["argv"][script:]], cwd=tmp_path, env=call["environment"], check=True
    )
    launch = f"{tmp_path}/{folder}/launch"
    assert python.calls()[-1]["argv"] == [
        "-m", "launcher", "batch",
        f"{launch}/run.toml", f"--cluster={launch}/cluster.toml", "--task=train",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("text", [text for text in HOSTILE if text and not {*"\n\\"} & {*text}])
def test_lines_of_a_sweep_can_be_pasted(
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bins = tmp_path / "bin"
    make_fake(bins, "sbatch", output="1\n")
    make_fake(bins, "squeue")
    python = make_fake(bins, "python")
    folder = f"runs/f{text}"
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "c.toml").write_text(CLUSTER_FILE)
    (tmp_path / "sweep.toml").write_text(
        f'run = "run.toml"\nfolder = {toml(folder)}\nname = "a"\n[grid]\ntrain.seed = [1]\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", environment(bins)["PATH"])
    assert cli.main(["sweep", "sweep.toml", "--cluster", "c.toml"]) == 0, capsys.readouterr().err
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[-2:]]
    (tmp_path / folder / "a" / "stop").touch()
    assert cli.main(["sweep", "sweep.toml", "--cluster", "c.toml"]) == EXIT_BAD_INPUT
    lines.append(capsys.readouterr().err.strip().partition("take it back: ")[2])
    for line in lines:
        subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    launcher = ["-m", "launcher"]
    assert [call["argv"] for call in python.calls()] == [
        [*launcher, "status", folder],
        [*launcher, "cancel", "--recursive", folder],
        [*launcher, "stop", "--undo", f"{tmp_path}/{folder}/a"],
    ]
    assert not list(tmp_path.rglob("pwned"))


def test_dry_run_text_is_what_a_shell_takes_literally(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "bin", "fake")
    values = {f"V{index}": value for index, value in enumerate(HOSTILE)}
    text = shell_text(Command((str(fake.path), *HOSTILE, *DASHED), values))
    subprocess.run(["bash", "-c", text], cwd=tmp_path, check=True)
    (call,) = fake.calls()
    assert call["argv"] == [*HOSTILE, *DASHED]
    assert {name: call["environment"][name] for name in values} == values
    assert not (tmp_path / "pwned").exists()


def test_words_that_reach_a_remote_shell() -> None:
    """DeepSpeed's ssh launcher does not quote: what is not literal there must not get there."""
    fine = ("python3", "-m", "mpotrain", "train", "/a/b-c_d.toml", "train.steps=5", "x=[1,2]")
    assert [p for p in remote_problems(fine[:-1], Path("/home/me"), {"PATH": "/a b"}) if p] == []
    for word in [fine[-1], *HOSTILE[1:]]:
        assert remote_problems((word,), Path("/home/me"), {}), word
    assert remote_problems((), Path("/home/a b"), {})
    assert remote_problems((), Path("/"), {"NCCL_X": "$(touch pwned)"})
    assert remote_problems((), Path("/"), {"PYTHONPATH": "`x`"})
    assert not remote_problems((), Path("/"), {"OTHER": "`x`"})
    assert dropped_variables({"NCCL_DEBUG": "1", "OMP_NUM_THREADS": "1"}) == ["OMP_NUM_THREADS"]
