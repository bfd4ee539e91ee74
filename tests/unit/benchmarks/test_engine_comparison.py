"""The comparison of engines runs and finds that they compute the same."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TINY = [
    "model.num_layers=1", "model.vocab_size=64", "model.context_length=16",
    "data.sequence_length=16", "train.global_batch_size=4", "train.micro_batch_size=2",
    "model.dropout=0.0", "model.attention_dropout=0.0",
]  # fmt: skip


def test_engines_agree(tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    run = str(ROOT / "configs" / "runs" / "gpt2-small-ttm16.toml")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.engines", run, *TINY, "--rounds", "2", "--out", out],
        check=True, cwd=ROOT, timeout=240,
    )  # fmt: skip
    engines = json.loads(out.read_text())["engines"]
    assert set(engines) == {"local", "megatron", "megatron, cached weights"}
    assert all(found["difference"] < 1e-5 for found in engines.values())
    assert all(found["tokens_per_second"] > 0 for found in engines.values())
