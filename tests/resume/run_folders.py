"""Run folders of encoders and T5, made of Hugging Face folders by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpotrain.cli import main

RUN = """
name = "tiny"
folder = "{folder}"
{model}
[data]
sources = [{{ path = "{data}" }}]
sequence_length = 24
split = [0.8, 0.2, 0.0]
objective = {objective}
[train]
steps = 3
global_batch_size = 8
micro_batch_size = 4
log_every = 1
eval_every = 3
eval_sequences = 8
tensorboard = false
optimizer = {{ kind = "adamw" }}
schedule = {{ kind = "cosine", lr = 1e-3, warmup_steps = 0 }}
"""
ENCODER = """[model]
kind = "encoder"
vocab_size = 96
context_length = 24
hidden_size = 32
num_layers = 4
num_heads = 4
ffn_size = 48
dropout = 0.0
attention_dropout = 0.0
"""
T5 = """[model]
kind = "t5"
vocab_size = 96
hidden_size = 32
head_size = 12
num_layers = 3
num_decoder_layers = 2
num_heads = 4
ffn_size = 56
relative_buckets = 8
relative_distance = 12
dropout = 0.0
"""
GPT2 = """[model]
kind = "gpt2"
vocab_size = 96
context_length = 24
hidden_size = 32
num_layers = 3
num_heads = 4
ffn_size = 128
dropout = 0.0
attention_dropout = 0.0
"""
MASKED = '{ kind = "masked", document_mask = false, mask_id = 95, cls_id = 94, sep_id = 93 }'
SPANS = (
    '{ kind = "span_corruption", num_sentinels = 20, first_sentinel_id = 95, eos_id = 1, '
    "start_id = 0 }"
)
CAUSAL = '{ kind = "causal" }'
KINDS = {"encoder": (ENCODER, MASKED), "t5": (T5, SPANS), "gpt2": (GPT2, CAUSAL)}

ALBERT = ["model.embedding_size=16"]
MPO = [
    "model.sites.query={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 2, 4]}",
    "model.sites.c_fc={kind='mpo', in_modes=[4, 2, 4], out_modes=[4, 3, 4]}",
]
CENTRAL = ["model.sharing={scope='central', vectors='tied'}", *MPO]
ADAPTER = ["model.adapter={rank=2, families=['query', 'c_proj']}"]
SHARED = ["model.sharing={scope='all'}"]


def prepare_markov(folder: Path) -> Path:
    """Prepare token numbers without a tokenizer."""
    arguments = ["prepare", "--synthetic", "markov", "--tokens", "20000", "--out", str(folder)]
    assert main(arguments) == 0
    return folder


class Workshop:
    """Makes runs of models; one folder for all of them."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data

    def run_file(self, kind: str, name: str) -> tuple[Path, Path]:
        """Write the run file of a kind and return it with its run folder."""
        model, objective = KINDS[kind]
        folder = self.root / name
        path = self.root / f"{name}.toml"
        values: Mapping[str, Any] = {"model": model, "objective": objective, "data": self.data}
        path.write_text(RUN.format(folder=folder, **values))
        return path, folder

    def convert(self, source: Path, kind: str, name: str, *more: str, to: str = "") -> int:
        """Convert a source into the run `name`; return the exit code."""
        path, _ = self.run_file(kind, name)
        return main(["convert", str(source), str(path), "--to", to or kind, *more])

    def made(self, source: Path, kind: str, name: str, *more: str, to: str = "") -> Path:
        """Convert a source and return the run folder."""
        assert self.convert(source, kind, name, *more, to=to) == 0
        return self.root / name

    def train(self, kind: str, name: str, *more: str) -> int:
        """Train a run; return the exit code."""
        return main(["train", str(self.run_file(kind, name)[0]), *more])
