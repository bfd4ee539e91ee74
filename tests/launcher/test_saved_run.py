"""A run folder that holds something already: runs at their end, checkpoints of other models."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from launch_fakes import CLUSTER_FILE, ROOT, RUN_FILE, Fake, make_fake

from launcher import cli
from launcher.saved_run import refuse_finished
from mpotrain.checkpoint.folders import step_name
from mpotrain.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Placement,
    RngRule,
    RunState,
    TensorEntry,
    fingerprint,
)
from mpotrain.checkpoint.manifest_file import (
    FORMAT,
    MANIFEST_NAME,
    encode_manifest,
    library_versions,
)
from mpotrain.config import load_config
from mpotrain.errors import EXIT_BAD_INPUT
from mpotrain.schema import to_dict
from mpotrain.tune.config import load_tune_config

CHECKPOINTS = Path("runs/small/checkpoints")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "cluster.toml").write_text(CLUSTER_FILE)
    monkeypatch.chdir(tmp_path)
    bins = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{bins}{os.pathsep}{os.environ['PATH']}")
    return make_fake(bins, "sbatch", output="4711\n")


def slurm(*arguments: str) -> int:
    return cli.main(["slurm", "run.toml", "--cluster", "cluster.toml", *arguments])


def save(step: int, *overrides: str, config: dict[str, Any] | None = None) -> None:
    """Write the manifest of a checkpoint of the run, as rank 0 does."""
    run = load_config(Path("run.toml"), overrides)
    tensors, offset = {}, 0
    for info in (*run.model.parameters(), *run.model.buffers()):
        place = Placement(file="a.bin", offset=offset, bytes=4 * info.size, dtype="F32")
        tensors[info.name] = TensorEntry(role=info.role, shape=info.shape, kinds={"weight": place})
        offset += place.bytes
    manifest = Manifest(
        format=FORMAT,
        run=RunState(
            step=step,
            consumed_samples=8 * step,
            num_updates=step,
            config=config or to_dict(run),
            data_fingerprint=None,
            rng=RngRule(seed=0, rule="none"),
            engine={},
            train_state={},
        ),
        versions=library_versions(),
        fingerprint=fingerprint({n: (t.role, t.shape) for n, t in tensors.items()}),
        tensors=tensors,
        files={"a.bin": FileEntry(bytes=offset, digest="0" * 32)},
    )
    folder = CHECKPOINTS / step_name(step)
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))


def end(outcome: str, step: int | None) -> None:
    Path("runs/small").mkdir(parents=True, exist_ok=True)
    content = {"outcome": outcome, "step": step, "exit_code": 0}
    Path("runs/small/outcome.json").write_text(json.dumps(content))


def test_a_checkpoint_of_the_same_run_is_gone_on_with(sbatch: Fake) -> None:
    save(20)
    # What does not say what the network computes may change.
    assert slurm("train.log_every=7", "model.dropout=0.2") == 0
    assert len(sbatch.calls()) == 1


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.num_layers=3", "model.num_layers: 4 -> 3"),  # other tensors
        ("model.num_heads=2", "model.num_heads: 4 in the checkpoint, now 2"),  # the same tensors
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
def test_checkpoint_of_another_model(
    sbatch: Fake, override: str, key: str, dry: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save(20)
    assert slurm(override, *dry) == EXIT_BAD_INPUT
    told = capsys.readouterr().err
    assert "run.toml: folder: runs/small holds another run: the checkpoint of step 20" in told
    assert key in told
    assert told.count("folder=...") == 1
    assert sbatch.calls() == []


def test_damaged_newest_checkpoint_is_passed_over(
    sbatch: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    save(20)
    save(40)
    (CHECKPOINTS / step_name(40) / MANIFEST_NAME).write_text("{")
    assert slurm("model.num_layers=3") == EXIT_BAD_INPUT
    assert "the checkpoint of step 20" in capsys.readouterr().err


def test_checkpoint_of_another_kind_of_run(
    sbatch: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = ROOT / "configs" / "tune" / "demo-mrpc.toml"
    save(20, config=to_dict(load_tune_config(tune)))
    assert slurm() == EXIT_BAD_INPUT
    assert "holds a fine-tuning run (--task tune)" in capsys.readouterr().err
    save(21)
    Path("run.toml").write_text(f"extends = ['{tune}']\nfolder = 'runs/small'\n")
    engine = ("engine={kind='deepspeed', device='cpu'}", "train.global_batch_size=32")
    assert slurm("--task", "tune", *engine) == EXIT_BAD_INPUT
    assert "holds a pretraining run, but this is a fine" in capsys.readouterr().err


def test_starts_here_compare_as_well(sbatch: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    save(20)
    arguments = ["torchrun", "run.toml", "--ranks-per-node=2", "--dry-run"]
    assert cli.main([*arguments, "model.num_layers=3"]) == EXIT_BAD_INPUT
    assert "another model" in capsys.readouterr().err
    assert cli.main(arguments) == 0


@pytest.mark.parametrize(
    ("outcome", "saved", "settings", "refused"),
    [
        ("done", 50, [], True),
        (None, 50, [], True),  # killed behind its last checkpoint
        ("done", None, [], True),  # its checkpoints were deleted
        ("resume", 49, [], False),
        ("done", 49, [], False),  # its last checkpoint is damaged or gone
        ("done", 50, ["train.steps=60"], False),
        ("done", 60, ["train.steps=55"], True),
        ("held", 30, ["train.stop_after=30"], True),
        ("held", 30, ["train.stop_after=40"], False),
        ("held", 30, [], False),
        ("done", 50, ["train.stop_after=70"], True),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
def test_run_at_its_end(
    sbatch: Fake,
    outcome: str | None,
    saved: int | None,
    settings: list[str],
    refused: bool,
    dry: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("run.toml").write_text(f"{RUN_FILE}steps = 50\n")
    if outcome is not None:
        end(outcome, 30 if outcome == "held" else 50)
    if saved is not None:
        save(saved)
    assert slurm(*settings, *dry) == (EXIT_BAD_INPUT if refused else 0)
    told = capsys.readouterr().err
    assert ("nothing is left to do" in told) == refused
    assert ["--test-only" in call["argv"] for call in sbatch.calls()] == [bool(dry)] * (not refused)
    if refused:
        key = "train.stop_after" if "train.stop_after=30" in settings else "train.steps"
        assert f"give it more steps ({key}=...)" in told


def test_a_fine_tuning_run_still_has_its_results_to_write(sbatch: Fake) -> None:
    run = load_tune_config(ROOT / "configs" / "tune" / "demo-mrpc.toml")
    save(run.train.steps)
    refuse_finished(run, Path("runs/small"))
    end("done", run.train.steps)
    with pytest.raises(Exception, match="nothing is left to do"):
        refuse_finished(run, Path("runs/small"))
