"""Run files of a tiny depth-shared encoder and a tiny T5 with mixtures, on stories."""

from __future__ import annotations

from pathlib import Path

from mpotrain.data.config import PrepareConfig, SentencePieceConfig
from mpotrain.data.prepare import prepare

RUN = """
name = "tiny"
folder = "{folder}"

[model]
{model}

[data]
sources = [{{ path = "{data}" }}]
sequence_length = 48
seed = 3
split = [0.8, 0.2, 0.0]

[data.objective]
{objective}

[train]
steps = 20
global_batch_size = 8
micro_batch_size = 2
seed = 7
log_every = 1
eval_every = 10
eval_sequences = 12
tensorboard = false

[train.optimizer]
kind = "lamb"
core_lr_factor = 0.5
weight_decay = 0.05
max_trust = 5.0

[train.schedule]
kind = "cosine"
lr = 1e-2
warmup_steps = 4

[checkpoint]
every = 6
keep_last = 9
"""
ENCODER = """
kind = "encoder"
vocab_size = 353
context_length = 48
hidden_size = 32
num_layers = 6
num_heads = 4
ffn_size = 64
embedding_size = 16
dropout = 0.1
sharing = { scope = "central", groups = 2, vectors = "tied" }
adapter = { rank = 2 }
start = { auxiliary_scale = "per_side" }

[model.sites]
query = { kind = "mpo", in_modes = [4, 2, 4], out_modes = [4, 2, 4] }
c_fc = { kind = "mpo", in_modes = [4, 2, 4], out_modes = [4, 4, 4] }
c_proj = { kind = "mpo", in_modes = [4, 4, 4], out_modes = [4, 2, 4] }
"""
MASKED = 'kind = "masked"\nwhole_word = true'
T5 = """
kind = "t5"
vocab_size = 450
hidden_size = 32
head_size = 8
num_layers = 2
num_heads = 4
ffn_size = 64
dropout = 0.1

[model.sites]
query = { kind = "mpo", in_modes = [4, 2, 4], out_modes = [4, 2, 4] }

[model.moe]
num_experts = 4
router = { top_k = 1 }
c_fc = { kind = "mpo", in_modes = [4, 4, 2], out_modes = [4, 4, 4] }
c_proj = { kind = "mpo", in_modes = [4, 4, 4], out_modes = [4, 4, 2] }
"""
SPANS = 'kind = "span_corruption"\ndocument_mask = true'
KINDS = {"encoder": (ENCODER, MASKED), "t5": (T5, SPANS)}


def prepare_stories(out: Path) -> Path:
    """Prepare short documents with words and ends."""
    tokenizer = SentencePieceConfig(vocab_size=350)
    config = PrepareConfig(
        sources=("synthetic:stories",), out=str(out), tokenizer=tokenizer, num_documents=400,
        num_workers=0,
    )  # fmt: skip
    prepare(config, progress=False)
    return out


def write_kind(kind: str, folder: Path, data: Path) -> Path:
    """Write the run file of a kind, with the run folder `run` beside it."""
    model, objective = KINDS[kind]
    folder.mkdir()
    path = folder / "run.toml"
    run = (folder / "run").as_posix()
    path.write_text(RUN.format(folder=run, model=model, objective=objective, data=data))
    return path


def folder_of(run: Path) -> Path:
    """Return the run folder of a run file."""
    return run.parent / "run"
