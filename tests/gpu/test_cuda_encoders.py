"""Depth-shared encoders and T5 on a CUDA device: the CPU's curve, the same bits twice, bf16."""

from pathlib import Path

import pytest
import torch
from encoder_runs import folder_of, prepare_stories, write_kind
from run_process import curve, state, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = ("encoder", "t5")
NO_DROPOUT = "model.dropout=0.0"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared short documents."""
    return prepare_stories(tmp_path_factory.mktemp("stories") / "data")


@pytest.mark.parametrize("kind", KINDS)
def test_curve_on_cuda_is_that_of_the_cpu(kind: str, stories: Path, tmp_path: Path) -> None:
    curves = []
    for device in ("cpu", "cuda"):
        run = write_kind(kind, tmp_path / device, stories)
        more = ["model.attention_dropout=0.0"] if kind == "encoder" else []
        train(run, f"engine.device={device}", NO_DROPOUT, *more)
        curves.append([loss for _, loss, *_ in curve(folder_of(run))])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_on_cuda_have_the_same_bits(
    kind: str, dtype: str, stories: Path, tmp_path: Path
) -> None:
    runs = [write_kind(kind, tmp_path / name, stories) for name in ("one", "two")]
    for run in runs:
        train(run, f"engine.dtype={dtype}", "engine.device=cuda")
    assert curve(folder_of(runs[0])) == curve(folder_of(runs[1]))
    first, second = (state(folder_of(run), 20) for run in runs)
    assert all(torch.equal(first[name]["weight"], second[name]["weight"]) for name in first)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_on_cuda_in_bf16(stage: int, stories: Path, tmp_path: Path) -> None:
    run = write_kind("encoder", tmp_path / "run", stories)
    world = min(2, torch.cuda.device_count())
    train(run, f"engine={{kind='deepspeed', zero_stage={stage}, dtype='bf16', device='cuda'}}",
          launcher="torchrun", world=world)  # fmt: skip
    assert curve(folder_of(run))[-1][1] < curve(folder_of(run))[0][1]
