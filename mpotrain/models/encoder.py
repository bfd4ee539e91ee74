"""Encoders like BERT, ALBERT and MPOBERT, with any of their matrices tensorized and shared."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpotrain.batch import NO_PAIR, Batch, LossOutput
from mpotrain.models.building import SiteBuilder
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.encoder_layers import LayerBuilder
from mpotrain.nn.activation import activation
from mpotrain.nn.attention import document_mask
from mpotrain.nn.encoder_block import Given
from mpotrain.nn.norm import LayerNorm
from mpotrain.nn.sharing import Adapter


class TokenHead(nn.Module):
    """What turns hidden states into rows that the embedding scores; the encoder calls its parts.

    Attributes:
        transform: layer (H -> E).
        norm: layer normalisation of its activated output.
        bias: parameter (V,), added to the scores.
    """

    def __init__(self, transform: nn.Module, width: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.transform, self.norm = transform, LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))


class Encoder(nn.Module):
    """Bidirectional encoder that predicts masked tokens and the order of segments.

    What several layers use (`bank`, `tied`, `adapters`) is owned here, read here and passed to the
    blocks: see `mpotrain.nn.sharing`.

    Attributes:
        config: sizes, the representation of each site, what layers share.
        compute_dtype: dtype of the activations; losses are computed in fp32.
        bank: central tensors that layers share.
        blocks: layers, or, where whole blocks are shared, one for each group.
        tied: biases and norms that the layers of a group share.
        adapters: low-rank additions of each layer, by layer and family.
    """

    def __init__(
        self, config: EncoderConfig, *, seed: int, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        """Build the model with weights drawn from `seed`; see `SiteBuilder`."""
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        build = SiteBuilder(config, seed)
        sites = {site.name: site for site in config.all_sites()}
        width, eps = config.embedding_width, config.norm_eps
        self.token_embedding = build.embedding(sites["token_embedding"])
        self.position_embedding = self._table("position_embedding", config.context_length, build)
        self.type_embedding = self._table("type_embedding", config.num_token_types, build)
        self.embedding_norm = LayerNorm(width, eps=eps)
        has_map = config.embedding_size is not None
        self.embedding_map = build.linear(sites["embedding_map"]) if has_map else None
        layers = LayerBuilder(config, build)
        self.bank, self.blocks = layers.bank(), layers.blocks()
        self.tied, self.adapters = layers.tied(), layers.adapters()
        is_pre = config.norm == "pre"
        self.final_norm = LayerNorm(config.hidden_size, eps=eps) if is_pre else None
        self.pooler = build.linear(sites["pooler"]) if config.pair_head else None
        self.pair_head = build.linear(sites["pair_head"]) if config.pair_head else None
        transform = build.linear(sites["mlm_head.transform"])
        self.mlm_head = TokenHead(transform, width, config.vocab_size, eps)
        self._activation = activation(config.activation)

    def forward(self, batch: Batch, *, return_logits: bool = False) -> LossOutput:
        """Compute the summed cross-entropy of the masked tokens of a micro-batch.

        Args:
            batch: token ids (B, T) with their targets and loss mask; where rows hold documents or
                pairs of segments also those, see `Batch`.
            return_logits: also return the scores (B, T, V) of all tokens in fp32.

        Returns:
            Sum over the targets that count, in fp32, and their number. With a pair head also the
            statistics `pair_loss`, `pair_correct` and `num_pairs`, and in training the loss of all
            pairs times `Batch.pair_weight` as auxiliary sum.
        """
        hidden = self.hidden(batch)
        chosen = batch.loss_mask
        logits = self.logits(hidden) if return_logits else None
        # Without any target these are no rows, through which all parameters still get a gradient.
        scores = self.logits(hidden[chosen]) if logits is None else logits[chosen]
        targets = batch.targets[chosen]
        loss_sum = functional.cross_entropy(_wide(scores), targets, reduction="sum")
        num_tokens = chosen.sum()
        auxiliary, statistics = None, {}
        if not self.training:
            statistics["correct"] = (scores.detach().argmax(-1) == targets).sum()
        if self.config.pair_head:
            pair_loss, told = self._pair_loss(hidden, batch)
            statistics |= told
            if self.training:
                weight = batch.pair_weight
                if weight is None:  # alone, a micro-batch is the whole batch
                    weight = num_tokens / told["num_pairs"].clamp_min(1)
                auxiliary = pair_loss * weight
        return LossOutput(
            loss_sum=loss_sum,
            num_tokens=num_tokens,
            logits=None if logits is None else _wide(logits),
            auxiliary_sum=auxiliary,
            statistics=statistics,
        )

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden state (B, T, H) of a batch, T <= context.

        Args:
            batch: `inputs`, and where they are there `positions`, `token_types`, `document_ids`.
        """
        length = batch.inputs.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"sequence of {length} tokens, but the model has "
                f"{self.config.context_length} positions (model.context_length)"
            )
        x = self._embed(batch)
        documents = batch.document_ids
        mask = None if documents is None else document_mask(documents, documents)
        for layer in range(self.config.num_layers):
            block, given = self.blocks[self.config.block(layer)], self.given(layer)
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(_run, block, x, mask, given, use_reentrant=False)
            else:
                x = _run(block, x, mask, given)
        normalised: Tensor = x if self.final_norm is None else self.final_norm(x)
        return normalised

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of all tokens for hidden states (..., H)."""
        rows = self.mlm_head.norm(self._activation(self.mlm_head.transform(hidden)))
        scores: Tensor = self.token_embedding.logits(rows)
        return scores + self.mlm_head.bias.to(scores.dtype)

    def pooled(self, hidden: Tensor) -> Tensor:
        """Return the pooled first token (B, H) of hidden states (B, T, H).

        Raises:
            ValueError: the encoder has no pooler (`pair_head` is off).
        """
        return self._pool(hidden[:, 0])

    def given(self, layer: int) -> Given:
        """Return the tensors that a layer uses and does not own."""
        group, config = self.config.group(layer), self.config
        given: Given = {
            family: {"central": self.bank.central(family, group)}
            for family in config.banked_families()
        }
        if config.ties_vectors():
            vectors = cast("nn.ParameterDict", self.tied[group])
            for name, vector in vectors.items():
                owner, leaf = name.rsplit("_", 1)
                given.setdefault(owner, {})[leaf] = vector
        if config.adapter is not None:
            for family, adapter in cast("nn.ModuleDict", self.adapters[layer]).items():
                own = cast("Adapter", adapter)
                given.setdefault(family, {}).update(u=own.u, d=own.d)
        return given

    def _table(self, name: str, rows: int, build: SiteBuilder) -> nn.Parameter:
        table = torch.empty(rows, self.config.embedding_width)
        return nn.Parameter(
            table.normal_(0.0, self.config.init_std, generator=build.generator(name))
        )

    def _embed(self, batch: Batch) -> Tensor:
        dtype, length = self.compute_dtype, batch.inputs.shape[1]
        x = self.token_embedding(batch.inputs, dtype)
        table, types = self.position_embedding.to(dtype), self.type_embedding.to(dtype)
        positions, segments = batch.positions, batch.token_types
        x = x + (table[:length] if positions is None else functional.embedding(positions, table))
        x = x + (types[0] if segments is None else functional.embedding(segments, types))
        x = functional.dropout(self.embedding_norm(x), self.config.dropout, self.training)
        mapped: Tensor = x if self.embedding_map is None else self.embedding_map(x)
        return mapped

    def _pool(self, rows: Tensor) -> Tensor:
        if self.pooler is None:
            raise ValueError("the encoder has no pooler: model.pair_head is false")
        return torch.tanh(self.pooler(rows))

    def _pair_loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed cross-entropy of all pairs of segments, and the pair statistics."""
        assert self.pair_head is not None
        labels = batch.pair_labels
        if labels is None:
            labels = torch.full_like(batch.inputs, NO_PAIR)
        chosen = labels != NO_PAIR
        scores, wanted = self.pair_head(self._pool(hidden[chosen])), labels[chosen]
        loss = functional.cross_entropy(_wide(scores), wanted, reduction="sum")
        return loss, {
            "pair_loss": loss.detach(),
            "pair_correct": (scores.detach().argmax(-1) == wanted).sum(),
            "num_pairs": chosen.sum(),
        }


def _run(block: nn.Module, x: Tensor, mask: Tensor | None, given: Given) -> Tensor:
    # A copy for each call, also that of recomputation: DeepSpeed's hooks change containers.
    result: Tensor = block(x, mask, {name: dict(parts) for name, parts in given.items()})
    return result


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
