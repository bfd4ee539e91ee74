"""The plan of a run says of its splits what the ranks would say when they open them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prepared_folder import write_folder

from mpotrain.config import load_config
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.stream import Split
from mpotrain.errors import DataError
from mpotrain.report.weigh import weigh

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "demo.toml"


def prepared(folder: Path, lengths: list[int]) -> str:
    """Prepare documents of so many tokens; return the setting that names them."""
    documents = [np.full(length, 7) for length in lengths]
    write_folder(folder, documents, vocab_size=16, documents_per_shard=50)
    return f'data.sources=[{{path="{folder}"}}]'


@pytest.mark.parametrize(
    ("lengths", "split", "told"),
    [
        ([90_000], [0.96, 0.02, 0.02], {"validation": "holds 0 documents with 0 tokens"}),
        ([90_000], [0.02, 0.02, 0.96], {"train": "(0.02 of 1", "validation": "(0.02 of 1"}),
        ([1] * 400, [0.9, 0.1, 0.0], {"validation": "less than one sample of 65"}),
        ([1] * 400, [0.1, 0.9, 0.0], {"train": "less than one sample of 65"}),
        ([64], [1.0, 0.0, 0.0], {"train": "holds 1 documents with 64 tokens"}),
        ([65], [1.0, 0.0, 0.0], {}),
        ([20] * 400, [0.9, 0.1, 0.0], {}),
    ],
)
def test_a_split_without_a_sample_is_a_problem(
    tmp_path: Path, lengths: list[int], split: list[float], told: dict[str, str]
) -> None:
    source = prepared(tmp_path / "data", lengths)
    run = load_config(DEMO, [source, f"data.split={split}", "data.sequence_length=64"])
    for every in (None, 5) if split[1] else (None,):
        opened: list[Split] = ["train", "validation"] if every else ["train"]
        problems = weigh(replace(run, train=replace(run.train, eval_every=every))).problems
        refused = []
        for name in opened:
            try:
                BlendedDataset(run.data, name)
            except DataError as error:
                refused.append(f"data.sources[0].path: {error}")
        assert problems == refused
        expected = [told[name] for name in opened if name in told]
        assert len(refused) == len(expected)
        assert all(part in text for part, text in zip(expected, refused, strict=True))


def test_a_damaged_index_is_told_by_the_plan(tmp_path: Path) -> None:
    settings = [prepared(tmp_path / "data", [20] * 400), "data.split=[0.9, 0.1, 0.0]"]
    run = load_config(DEMO, settings)
    assert weigh(run).problems == []
    (tmp_path / "data" / "shard-00000.idx").unlink()
    (problem,) = weigh(run).problems
    assert "shard-00000.idx is missing" in problem


def test_prepared_data_are_weighed_without_torch(tmp_path: Path) -> None:
    source = prepared(tmp_path / "data", [90_000])
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mpotrain.config import load_config\n"
        "from mpotrain.report.weigh import weigh\n"
        f"print(weigh(load_config(Path({str(DEMO)!r}), [{source!r}])).problems)\n"
        "print('torch' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "less than one sample" in out.stdout
    assert out.stdout.splitlines()[-1] == "False"
