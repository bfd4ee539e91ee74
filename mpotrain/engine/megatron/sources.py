"""What a module of a chunk needs to know of the network: passed through `ModuleSpec.params`.

Megatron-core builds modules from specifications and fixed constructor arguments (sizes, the
configuration, process groups). What is particular to one place in the network - its logical names,
its operator, how its features are cut - travels in one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.engine.megatron.slots import Slots
from mpotrain.models.sites import Site
from mpotrain.nn.activation import ActivationName
from mpotrain.nn.moe.config import MoEConfig
from mpotrain.tensor.cached import StepCache


@dataclass(frozen=True)
class LinearSource:
    """One linear layer.

    Attributes:
        slots: makes the parameters.
        site: the matrix: logical name, sizes, representation.
        period: how its cut features are shared out, see `mpotrain.engine.megatron.periods`.
        bias: logical name of the bias; None without one.
        central: logical name of a central tensor that layers share; None where the site owns all
            of its cores.
        adapter: logical names of the factors U (I, r) and D (r, J) of a low-rank addition; None
            without one.
        cache: where the matrix is kept over the micro-batches of a step; None = rebuild it in each.
    """

    slots: Slots
    site: Site
    period: int
    bias: str | None = None
    central: str | None = None
    adapter: tuple[str, str] | None = None
    cache: StepCache | None = None


@dataclass(frozen=True)
class NormSource:
    """One normalisation.

    Attributes:
        slots: makes the parameters.
        weight: logical name of the gains.
        bias: logical name of the shifts; None for an RMS norm.
        eps: added to the variance.
    """

    slots: Slots
    weight: str
    bias: str | None
    eps: float


@dataclass(frozen=True)
class AttentionSource:
    """One attention.

    Attributes:
        projections: the fused layer of queries, keys and values, or the three layers.
        out: layer behind the heads.
        causal: whether position t sees positions up to t alone.
        scale: factor on the scores; None = 1 / sqrt(head size).
    """

    projections: tuple[LinearSource, ...]
    out: LinearSource
    causal: bool
    scale: float | None = None


@dataclass(frozen=True)
class FeedForwardSource:
    """Two linear layers around an activation.

    Attributes:
        c_fc: first layer.
        c_proj: second layer.
        activation: between them.
        dropout: rate behind the activation (T5); 0 = none.
    """

    c_fc: LinearSource
    c_proj: LinearSource
    activation: ActivationName
    dropout: float = 0.0


@dataclass(frozen=True)
class MixtureSource:
    """A mixture of experts in place of a feed-forward layer.

    Attributes:
        slots: makes the parameters.
        name: logical name of the mixture.
        moe: the section of the run file.
        router: site of the router.
        c_fc: site of the experts' first matrices.
        c_proj: site of the experts' second matrices.
        period: how the features between the two are shared out over expert-tensor ranks.
        activation: between the two matrices.
    """

    slots: Slots
    name: str
    moe: MoEConfig
    router: Site
    c_fc: Site
    c_proj: Site
    period: int
    activation: ActivationName


@dataclass(frozen=True)
class LayerSource:
    """One transformer layer.

    Attributes:
        attention: of the sequence to itself.
        norm_1: of self-attention.
        norm_2: of the feed-forward layer.
        ffn: feed-forward layer or mixture.
        cross_attention: to the encoder; None without.
        norm_cross: of cross-attention.
        is_post_norm: normalise behind each residual sum (BERT), not in front of each layer.
        residual_scale: factor of the residual stream in a post-norm sum (DeepNorm).
        recompute: keep the layer's input alone and compute it again in the backward pass.
    """

    attention: AttentionSource
    norm_1: NormSource
    norm_2: NormSource
    ffn: FeedForwardSource | MixtureSource
    cross_attention: AttentionSource | None = None
    norm_cross: NormSource | None = None
    is_post_norm: bool = False
    residual_scale: float = 1.0
    recompute: bool = False
