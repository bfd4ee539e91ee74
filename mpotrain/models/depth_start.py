"""Start of deep encoders from one set of cores (Liu et al. 2023, section 3.3 and algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpotrain.models.encoder_config import MODULES, EncoderConfig
from mpotrain.nn.deep_init import auxiliary_factors, split_cores
from mpotrain.tensor.spec import MPOSpec


def auxiliary_scaling(config: EncoderConfig, spec: MPOSpec, block: int) -> tuple[float, ...]:
    """Return the factors that the auxiliary tensors of a block start with.

    Args:
        config: of the encoder; `start` says which layers are scaled and how.
        spec: an operator of the block.
        block: number of the block; of blocks that several layers share, the first layer counts.
    """
    start = config.start
    first = block * (config.num_layers // config.num_blocks)
    scale = start.auxiliary_scale if first >= start.unscaled_layers else "none"
    return auxiliary_factors(spec, scale, config.num_layers)


def depth_shared_tensors(
    config: EncoderConfig, family: str, cores: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the cores of all layers of a family, made of those of one matrix.

    The central tensor of every group is a copy, and so are the auxiliary tensors of every layer;
    those from layer `start.unscaled_layers` on are scaled as `start.auxiliary_scale` says. With
    "none" every layer computes what the matrix did.

    Args:
        config: of the encoder to fill, whatever its layers share.
        family: a tensorized family of `BLOCK_FAMILIES`.
        cores: (d, i, j, d') each, of the shapes of the family's operator.

    Returns:
        Tensors by logical name, in the dtype of `cores`; none shares memory with another.

    Raises:
        ValueError: the family is dense, or the cores have other shapes.
    """
    spec = getattr(config.sites, family).spec(*config.site_shapes()[family])
    if spec is None:
        raise ValueError(f"{family} is dense: it has no cores to fill")
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != spec.core_shapes:
        raise ValueError(f"{family}: the cores have the shapes {shapes}, not {spec.core_shapes}")
    central, auxiliaries = split_cores(cores, spec)
    is_banked = family in config.banked_families()
    values: dict[str, Tensor] = {}
    if is_banked:
        for group in range(config.sharing.groups):
            values[f"bank.{family}.{group}"] = central.clone()
    places = [k for k in range(spec.num_cores) if k != spec.central_index]
    for block in range(config.num_blocks):
        module = f"blocks.{block}.{MODULES[family]}"
        factors = auxiliary_scaling(config, spec, block)
        for number, (core, factor) in enumerate(zip(auxiliaries, factors, strict=True)):
            leaf = f"auxiliaries.{number}" if is_banked else f"cores.{places[number]}"
            values[f"{module}.{leaf}"] = core * factor
        if not is_banked:
            values[f"{module}.cores.{spec.central_index}"] = central.clone()
    return values
