"""The one place where sections of a run file become objects."""

from __future__ import annotations

import os
import warnings

import torch
from torch import nn

from mpotrain.checkpoint.manifest import Signature
from mpotrain.config import RunConfig, RunSettings, vocabulary_problem
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.stream import Split
from mpotrain.engine.base import Engine
from mpotrain.engine.config import DeepSpeedConfig, LocalConfig
from mpotrain.engine.local import LocalEngine
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.errors import DataError
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config
from mpotrain.nn.roles import role_of
from mpotrain.parallel.plan import batch_layout
from mpotrain.parallel.ranks import World
from mpotrain.train.optim import build_optimizer


def prepare_torch(run: RunSettings) -> None:
    """Set what decides the bits of a run before any tensor exists."""
    if run.train.deterministic:
        # cuBLAS reads this when it is initialised; without it torch refuses deterministic mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Every value that is read has been written: filling fresh memory would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # 16-bit runs use fp32 products for the merging of cores alone: TF32 keeps more than bf16 needs.
    torch.set_float32_matmul_precision("high" if run.engine.dtype == "bf16" else "highest")


def build_model(model: AnyModel, *, seed: int, dtype: str) -> nn.Module:
    """Build the network of a run with its start weights.

    Args:
        model: the model section.
        seed: of the start weights.
        dtype: `fp32` or `bf16`: what the model computes in; parameters are fp32.
    """
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32
    if isinstance(model, EncoderConfig):
        return Encoder(model, seed=seed, compute_dtype=compute)
    if isinstance(model, T5Config):
        return T5(model, seed=seed, compute_dtype=compute)
    return GPT2(model, seed=seed, compute_dtype=compute)


def build_engine(run: RunSettings, model: nn.Module, world: World) -> Engine:
    """Put a model and its optimizer into the engine that the run asks for."""
    mask = run.train.central_mask
    optimizer = build_optimizer(model, run.train.optimizer, mask, device=world.device)
    clip_norm = run.train.clip_norm or None
    if isinstance(run.engine, LocalConfig):
        return LocalEngine(
            model, optimizer, config=run.engine, world=world, seed=run.train.seed,
            clip_norm=clip_norm, central_mask=mask,
        )  # fmt: skip
    if isinstance(run.engine, MegatronConfig):
        return _megatron_engine(run, run.engine, model, optimizer, world)
    assert isinstance(run.engine, DeepSpeedConfig)
    from mpotrain.engine.deepspeed import DeepSpeedEngine

    layout = batch_layout(run.train.global_batch_size, run.train.micro_batch_size, world.size)
    return DeepSpeedEngine(
        model, optimizer, config=run.engine, world=world, seed=run.train.seed,
        clip_norm=clip_norm, micro_batch_size=run.train.micro_batch_size,
        accumulation=layout.accumulation, global_batch_size=run.train.global_batch_size,
        expert_ranks=run.parallel.expert, central_mask=mask,
    )  # fmt: skip


def _megatron_engine(
    run: RunSettings,
    config: MegatronConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> Engine:
    from mpotrain.engine.megatron import cpu

    assert isinstance(run, RunConfig)  # fine-tuning refuses this engine
    with warnings.catch_warnings():
        # It tells of every optional package that is not there, from every rank.
        warnings.simplefilter("ignore")
        cpu.install()  # before megatron-core is imported; does nothing where there is CUDA
        try:
            from mpotrain.engine.megatron.engine import MegatronEngine
        except BaseException:
            cpu.uninstall()
            raise
    try:
        return MegatronEngine(
            model, optimizer, network=run.model, config=config, world=world, seed=run.train.seed,
            clip_norm=run.train.clip_norm or None, central_mask=run.train.central_mask,
        )  # fmt: skip
    finally:
        cpu.uninstall()  # the engine has its own by now


def open_data(run: RunConfig, split: Split) -> BlendedDataset:
    """Open a split and hold its tokenizer against the model.

    Raises:
        DataError: the data are damaged, or their token ids do not fit the model.
    """
    dataset = BlendedDataset(run.data, split)
    ids, folder = dataset.tokenizer.vocab_size, run.data.sources[0].path
    if (problem := vocabulary_problem(run, ids, folder)) is not None:
        raise DataError(problem)
    return dataset


def model_signatures(model: nn.Module, run: RunConfig) -> dict[str, Signature]:
    """Return role and global shape of all that a checkpoint holds; shapes are the configuration's.

    A rank's own tensors may be smaller: it holds the rows of its experts alone.
    """
    roles = {name: str(role_of(parameter)) for name, parameter in model.named_parameters()}
    parameters = {info.name: (roles[info.name], info.shape) for info in run.model.parameters()}
    return parameters | {info.name: (info.role, info.shape) for info in run.model.buffers()}
