"""The command line of the pre-flight on one process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpotrain.errors import ConfigError
from mpotrain.preflight.arguments import add_arguments, options_of
from mpotrain.preflight.options import CHECKS, PreflightOptions


def parsed(*argv: str) -> PreflightOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_of(parser.parse_args(["--out", "reports", *argv]))


def test_options_of_a_command_line() -> None:
    options = parsed("--skip", "disk", "--skip", "clock", "--nodes", "a, b,", "--min-free-gib", "3")
    assert options.out.is_absolute()
    assert options.written_folder == options.out
    assert options.nodes == ("a", "b")
    assert [check for check in CHECKS if not options.does(check)] == ["disk", "clock"]
    assert options.min_free_gib == 3
    assert parsed("--run-folder", "/r").written_folder == Path("/r")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--min-free-gib", "-1"], "--min-free-gib -1.0: must be a number of at least 0"),
        (["--max-clock-skew-seconds", "nan"], "--max-clock-skew-seconds nan"),
        (["--timeout-seconds", "2"], "--timeout-seconds 2.0: must be at least 10"),
        (["--expect-gpus", "-1"], "--expect-gpus -1"),
        (["--expect-gpus", "8", "--device", "cpu"], "--expect-gpus 8: goes with"),
        (["--per-node-start"], "--per-node-start: needs"),
        (["--nodes", "a,b,a"], "names a node twice"),
    ],
)
def test_values_that_cannot_be(argv: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match="command line: ") as caught:
        parsed(*argv)
    assert text in str(caught.value)


def run(out: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[3]
    keep = {key: value for key, value in os.environ.items() if "SLURM" not in key}
    own = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": "me"}
    return subprocess.run(
        [sys.executable, "-m", "mpotrain", "preflight", "--out", str(out), *argv],
        env=keep | own | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_one_process_checks_its_node(tmp_path: Path) -> None:
    done = run(tmp_path / "reports", "--run-folder", str(tmp_path / "run"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "pre-flight of 1 node(s), 1 rank(s): all good" in done.stdout
    summary = json.loads((tmp_path / "reports" / "summary.json").read_text())
    assert summary["ok"] is True
    assert summary["bad_nodes"] == []
    disks = summary["measurements"]["nodes"]["me"]["disks"]
    assert disks[0]["path"] == str(tmp_path / "run")
    assert all(disk["write_mib_per_s"] > 0 for disk in disks)
    report = json.loads((tmp_path / "reports" / "node-me.json").read_text())
    assert report["ranks"][0]["versions"]["mpotrain"] == "0.1.0"


def test_a_bad_node_is_named_in_json_with_exit_code_2(tmp_path: Path) -> None:
    done = run(
        tmp_path, "--json", "--device", "cpu", "--min-free-gib", "1e9",
        TMPDIR=str(tmp_path / "missing" / "x"),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (bad,) = json.loads(done.stdout)["bad_nodes"]
    assert bad["node"] == "me"
    assert bad["certain"] is True
    assert "1e+09 are needed" in bad["problems"][0]
    assert (tmp_path / "missing" / "x").is_dir()


def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cuda", "--skip", "disk", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert 'bad node me: "cuda" was asked for, but torch sees no CUDA device' in done.stdout
    done = run(tmp_path, "--expect-gpus", "8", "--skip", "disk", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "bad node me: has 0 GPU(s), expected 8" in done.stdout


def test_a_broken_environment_of_libraries_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    root = Path(__file__).resolve().parents[3]
    out = tmp_path / "reports"
    done = run(out, "--device", "cpu", PYTHONPATH=f"{tmp_path}:{root}")
    assert done.returncode == 2, done.stderr
    assert "libcudart.so.12: cannot open" in done.stdout
    assert "Traceback" not in done.stderr
    assert json.loads((out / "summary.json").read_text())["ok"] is False
