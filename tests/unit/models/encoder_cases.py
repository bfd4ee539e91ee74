"""Small encoders with every way of sharing, batches with every field, and a plain reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpotrain.batch import Batch
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import MODULES, EncoderConfig, EncoderSites
from mpotrain.nn.config import DenseSite, MPOSite, TTMSite
from mpotrain.nn.sharing_config import AdapterConfig, SharingConfig, StartConfig
from mpotrain.tensor.contract import rebuild

VOCABULARY, LENGTH = 40, 12
SQUARE = MPOSite(in_modes=(2, 2, 2, 2, 1), out_modes=(2, 1, 2, 2, 2))
WIDE = MPOSite(in_modes=(2, 2, 2, 2, 1), out_modes=(2, 2, 2, 2, 2))
NARROW = MPOSite(in_modes=(2, 2, 2, 2, 2), out_modes=(1, 2, 2, 2, 2))
FIVE_CORES = EncoderSites(
    query=SQUARE, key=SQUARE, value=SQUARE, attention_out=SQUARE, c_fc=WIDE, c_proj=NARROW
)
SOME_DENSE = EncoderSites(
    embedding=TTMSite(rank=4),
    query=SQUARE,
    key=DenseSite(bias=False),
    c_fc=MPOSite(in_modes=(4, 4), out_modes=(4, 8), cap=5),
)
CENTRAL = SharingConfig(scope="central")
CENTRAL_TIED = SharingConfig(scope="central", groups=2, vectors="tied")
CENTRAL_INDEPENDENT = SharingConfig(scope="central", groups=2, start="independent")
ALL = SharingConfig(scope="all", groups=2)
ADAPTER = AdapterConfig(rank=2, std=0.3)


def encoder_config(**changes: Any) -> EncoderConfig:
    """Four layers of width 16 without dropout, with five cores in every matrix."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "context_length": LENGTH,
        "hidden_size": 16,
        "num_layers": 4,
        "num_heads": 2,
        "ffn_size": 32,
        "embedding_size": 8,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.2,
        "sites": FIVE_CORES,
    }
    return EncoderConfig(**(settings | changes))


EVERY_KIND = [
    encoder_config(sharing=sharing, sites=sites, adapter=adapter, norm=norm, embedding_size=width,
                   pair_head=pair_head)
    for sharing, sites in (
        (SharingConfig(), FIVE_CORES),
        (SharingConfig(), EncoderSites()),
        (CENTRAL, FIVE_CORES),
        (CENTRAL_TIED, FIVE_CORES),
        (CENTRAL_TIED, SOME_DENSE),
        (CENTRAL_INDEPENDENT, SOME_DENSE),
        (ALL, EncoderSites()),
        (ALL, FIVE_CORES),
    )
    for adapter, norm, width, pair_head in (
        (None, "post", 8, True),
        (ADAPTER, "pre", None, True),
        (AdapterConfig(families=("c_fc", "value")), "post", None, False),
    )
]  # fmt: skip


def build(config: EncoderConfig, seed: int = 3, *, shaken: bool = True) -> Encoder:
    """An encoder in float64; where shaken, also of what starts at zero or one."""
    model = Encoder(config, seed=seed, compute_dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(seed)
    if shaken:
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise)
    return model


def batch(rows: int = 3, seed: int = 0, **changes: Any) -> Batch:
    """Rows of two documents and padding, with pairs, segments and masked targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    documents = torch.tensor([1] * 6 + [2] * 4 + [0] * 2).expand(rows, -1)
    labels = torch.full((rows, LENGTH), -100)
    labels[:, 0] = torch.randint(2, (rows,), generator=generator)
    labels[0, 6] = 1
    fields: dict[str, Any] = {
        "inputs": tokens,
        "targets": torch.randint(VOCABULARY, (rows, LENGTH), generator=generator),
        "loss_mask": (torch.rand(rows, LENGTH, generator=generator) < 0.3) & (documents > 0),
        "sample_ids": torch.arange(rows),
        "document_ids": documents,
        "positions": torch.tensor([*range(6), *range(4), 0, 1]).expand(rows, -1),
        "token_types": torch.tensor([0] * 3 + [1] * 3 + [0] * 6).expand(rows, -1),
        "pair_labels": labels,
    }
    return Batch(**(fields | changes))


def bare(tokens: Tensor) -> Batch:
    """Token ids alone."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Batch(tokens, tokens, mask, torch.arange(len(tokens)))


def matrix(model: Encoder, layer: int, family: str) -> Tensor:
    """The matrix of a layer, from nothing but logical names of parameters."""
    config, named = model.config, dict(model.named_parameters())
    name = f"blocks.{config.block(layer)}.{MODULES[family]}"
    if f"{name}.weight" in named:
        weight = named[f"{name}.weight"].t()
    else:
        spec = getattr(config.sites, family).spec(*config.site_shapes()[family])
        cores = [named.get(f"{name}.cores.{k}") for k in range(spec.num_cores)]
        if cores[0] is None:
            count = spec.num_cores - 1
            cores = [named[f"{name}.auxiliaries.{k}"] for k in range(count)]
            bank = named[f"bank.{family}.{config.group(layer)}"]
            cores.insert((spec.num_cores - 1) // 2, bank)
        weight = rebuild(cores, spec)
    adapter = f"adapters.{layer}.{family}"
    if f"{adapter}.u" in named:
        weight = weight + named[f"{adapter}.u"] @ named[f"{adapter}.d"]
    return weight


def reference_hidden(model: Encoder, data: Batch) -> Tensor:
    """The last hidden state by plain formulas: one matrix product and one softmax at a time."""
    return Reference(model, data).hidden()


class Reference:
    """Plain formulas over the parameters of an encoder by logical name."""

    def __init__(self, model: Encoder, data: Batch) -> None:
        self.model, self.data, self.config = model, data, model.config
        self.named = dict(model.named_parameters())

    def linear(self, x: Tensor, layer: int, family: str) -> Tensor:
        tied = f"tied.{self.config.group(layer)}.{family}_bias"
        own = f"blocks.{self.config.block(layer)}.{MODULES[family]}.bias"
        y = x @ matrix(self.model, layer, family)
        return y + self.named[tied if tied in self.named else own] if self.has(tied, own) else y

    def has(self, *names: str) -> bool:
        return any(name in self.named for name in names)

    def norm(self, x: Tensor, stem: str) -> Tensor:
        spread = x.var(-1, unbiased=False, keepdim=True) + self.config.norm_eps
        normalised = (x - x.mean(-1, keepdim=True)) / spread.sqrt()
        return normalised * self.named[f"{stem}weight"] + self.named[f"{stem}bias"]

    def block_norm(self, x: Tensor, layer: int, name: str) -> Tensor:
        tied = f"tied.{self.config.group(layer)}.{name}_"
        own = f"blocks.{self.config.block(layer)}.{name}."
        return self.norm(x, tied if self.has(f"{tied}weight") else own)

    def attention(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = (
            self.linear(x, layer, family).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
            for family in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        documents = self.data.document_ids
        if documents is not None:
            apart = documents[:, :, None] != documents[:, None, :]
            scores = scores.masked_fill(apart[:, None], -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.linear(mixed, layer, "attention_out")

    def ffn(self, x: Tensor, layer: int) -> Tensor:
        inner = functional.gelu(self.linear(x, layer, "c_fc"), approximate="tanh")
        return self.linear(inner, layer, "c_proj")

    def embedded(self) -> Tensor:
        data, config, named = self.data, self.config, self.named
        everywhere = torch.arange(data.inputs.shape[1]).expand(len(data.inputs), -1)
        positions = everywhere if data.positions is None else data.positions
        types = torch.zeros_like(everywhere) if data.token_types is None else data.token_types
        spec = config.sites.embedding.spec(VOCABULARY, config.embedding_width)
        if spec is None:
            table = named["token_embedding.weight"]
        else:
            cores = [named[f"token_embedding.cores.{k}"] for k in range(spec.num_cores)]
            table = rebuild(cores, spec)
        x = table[data.inputs] + named["position_embedding"][positions]
        x = self.norm(x + named["type_embedding"][types], "embedding_norm.")
        if config.embedding_size is None:
            return x
        return x @ named["embedding_map.weight"].t() + named["embedding_map.bias"]

    def hidden(self) -> Tensor:
        config, x = self.config, self.embedded()
        scale = (2 * config.num_layers) ** 0.25 if config.start.deepnorm else 1.0
        for layer in range(config.num_layers):
            for part, name in ((self.attention, "attention_norm"), (self.ffn, "ffn_norm")):
                if config.norm == "post":
                    x = self.block_norm(scale * x + part(x, layer), layer, name)
                else:
                    x = x + part(self.block_norm(x, layer, name), layer)
        return self.norm(x, "final_norm.") if config.norm == "pre" else x


DEEPNORM = StartConfig(deepnorm=True)
