"""The profiler writes one trace of exactly the steps asked for."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from mpotrain.errors import StorageError
from mpotrain.train.config import ProfileConfig
from mpotrain.train.profiler import StepProfiler

CPU = torch.device("cpu")


def run(profiler: StepProfiler, steps: range, device: torch.device = CPU) -> None:
    """Step s does s + 1 products of its own size, so that the trace tells which steps it holds."""
    with profiler:
        for step in steps:
            profiler.before_step(step)
            matrix = torch.ones(step + 2, step + 2, device=device)
            for _ in range(step + 1):
                matrix @ matrix
            profiler.after_step(step)


def products(trace: Path) -> list[int]:
    """Sizes of the products in a trace, sorted."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted(
        event["args"]["Input Dims"][0][0]
        for event in events
        if event.get("name") == "aten::mm" and event.get("cat") == "cpu_op"
    )


def expected(steps: range) -> list[int]:
    return sorted(step + 2 for step in steps for _ in range(step + 1))


def test_trace_holds_exactly_the_steps(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(start_step=2, num_steps=2), tmp_path, rank=0, device=CPU)
    run(profiler, range(6))
    assert profiler.trace_file == tmp_path / "profile" / "step-00000002-rank0.json.gz"
    assert products(profiler.trace_file) == expected(range(2, 4))
    assert [file.name for file in (tmp_path / "profile").iterdir()] == [profiler.trace_file.name]


def test_resume_in_the_middle_and_early_end_write_what_there_is(tmp_path: Path) -> None:
    config = ProfileConfig(start_step=2, num_steps=5)
    profiler = StepProfiler(config, tmp_path, rank=0, device=CPU)
    run(profiler, range(3, 5))
    assert profiler.trace_file is not None
    assert profiler.trace_file.name == "step-00000003-rank0.json.gz"
    assert products(profiler.trace_file) == expected(range(3, 5))


@pytest.mark.parametrize(
    ("config", "rank", "steps"),
    [
        (None, 0, range(3)),
        (ProfileConfig(start_step=0, num_steps=1), 1, range(3)),
        (ProfileConfig(start_step=5, num_steps=1), 0, range(3)),
        (ProfileConfig(start_step=0, num_steps=2), 0, range(2, 5)),
    ],
)
def test_nothing_is_written_where_nothing_was_asked(
    tmp_path: Path, config: ProfileConfig | None, rank: int, steps: range
) -> None:
    run(StepProfiler(config, tmp_path, rank=rank, device=CPU), steps)
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_have_their_own_file(tmp_path: Path) -> None:
    config = ProfileConfig(start_step=0, num_steps=1, all_ranks=True, memory=True)
    profiler = StepProfiler(config, tmp_path, rank=3, device=CPU)
    run(profiler, range(2))
    assert profiler.trace_file is not None
    assert profiler.trace_file.name == "step-00000000-rank3.json.gz"
    assert profiler.snapshot_file is None
    events = json.loads(gzip.decompress(profiler.trace_file.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "[memory]" for event in events)


def test_unwritable_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    profiler = StepProfiler(ProfileConfig(start_step=0, num_steps=1), tmp_path, rank=0, device=CPU)
    with pytest.raises(StorageError, match="trace cannot be written"):
        run(profiler, range(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trace_and_snapshot(tmp_path: Path) -> None:
    device = torch.device("cuda")
    config = ProfileConfig(start_step=1, num_steps=1, memory=True)
    profiler = StepProfiler(config, tmp_path, rank=0, device=device)
    run(profiler, range(3), device)
    assert profiler.trace_file is not None
    assert profiler.snapshot_file is not None
    assert profiler.snapshot_file.stat().st_size > 0
    events = json.loads(gzip.decompress(profiler.trace_file.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
