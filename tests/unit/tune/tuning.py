"""A tiny pretrained encoder, a toy task that it can learn, and the files of both runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from unit.tune.glue_files import write_lines

from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.prepare import prepare

PRETRAINING = """
name = "tiny-encoder"
folder = "{folder}"

[model]
kind = "encoder"
vocab_size = 323
context_length = 48
hidden_size = 32
num_layers = 2
num_heads = 2
ffn_size = 64
embedding_size = 16
dropout = 0.1
attention_dropout = 0.0

[model.sharing]
scope = "central"

[model.sites]
query = {{ kind = "mpo", in_modes = [4, 8], out_modes = [8, 4] }}
c_fc = {{ kind = "mpo", in_modes = [4, 2, 4], out_modes = [4, 4, 4] }}
c_proj = {{ kind = "mpo", in_modes = [4, 4, 4], out_modes = [4, 2, 4] }}

[data]
sources = [{{ path = "{data}" }}]
sequence_length = 48
split = [0.9, 0.1, 0.0]

[data.objective]
kind = "masked"

[train]
steps = 4
global_batch_size = 8
micro_batch_size = 4
tensorboard = false

[train.schedule]
kind = "constant"
lr = 1e-3

[engine]
kind = "local"
device = "cpu"
"""

TUNING = """
name = "tiny-task"
folder = "{folder}"
source = "{source}"

[task]
kind = "{kind}"
train = "{train}"
validation = "{validation}"
sequence_length = 24

[train]
steps = 30
global_batch_size = 16
micro_batch_size = 4
seed = 5
log_every = 1
tensorboard = false

[train.optimizer]
kind = "adamw"
core_lr_factor = 0.5
weight_decay = 0.01

[train.schedule]
kind = "constant"
lr = 3e-3

[engine]
kind = "local"
device = "cpu"

[checkpoint]
every = 10
keep_last = 9
"""


def prepare_stories(folder: Path) -> Path:
    """Prepare stories with a vocabulary of 320 pieces."""
    config = PrepareConfig(
        sources=("synthetic:stories",),
        out=str(folder),
        tokenizer=SentencePieceConfig(vocab_size=320),
        num_documents=300,
        num_workers=0,
    )
    prepare(config, progress=False)
    return folder


def write_pretraining(folder: Path, data: Path) -> Path:
    """Write the file of a pretraining run, whose run folder is `folder`/encoder."""
    path = folder / "pretraining.toml"
    path.write_text(
        PRETRAINING.format(folder=(folder / "encoder").as_posix(), data=data.as_posix())
    )
    return path


def write_sentences(path: Path, count: int, seed: int) -> Path:
    """Write SST-2 lines: class 1 exactly where the sentence names a ball or a lamp."""
    rng = np.random.default_rng(seed)
    names, places = ("Anna", "Ben", "Lucy", "Tom"), ("attic", "barn", "park")
    things = (("coin", "hat", "kite"), ("ball", "lamp"))
    lines = ["sentence\tlabel"]
    for _ in range(count):
        label = int(rng.integers(2))
        name, thing, place = (str(rng.choice(c)) for c in (names, things[label], places))
        lines.append(f"{name} found the {thing} in the {place}.\t{label}")
    return write_lines(path, lines)


def write_scores(path: Path, count: int, seed: int) -> Path:
    """Write STS-B lines: the score is 5 where both sentences name one thing, else 1 or so."""
    rng = np.random.default_rng(seed)
    things = ("coin", "hat", "ball", "lamp")
    head = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    lines = ["\t".join(head.split())]
    for number in range(count):
        first, second = str(rng.choice(things)), str(rng.choice(things))
        score = 5.0 if first == second else float(rng.integers(0, 20)) / 10
        row = [str(number), *["none"] * 6, f"Tom saw the {first}.", f"Mary saw the {second}."]
        lines.append("\t".join([*row, f"{score:.3f}"]))
    return write_lines(path, lines)


def write_tuning(folder: Path, source: Path, *, kind: str = "sst2") -> Path:
    """Write the file of a fine-tuning run in `folder`/run, and its examples."""
    folder.mkdir(parents=True, exist_ok=True)
    write = write_scores if kind == "stsb" else write_sentences
    train = write(folder / "train.tsv", 90, seed=1)
    validation = write(folder / "dev.tsv", 37, seed=2)
    path = folder / "tuning.toml"
    path.write_text(
        TUNING.format(
            folder=(folder / "run").as_posix(),
            source=source.as_posix(),
            kind=kind,
            train=train.as_posix(),
            validation=validation.as_posix(),
        )
    )
    return path
