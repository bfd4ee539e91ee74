"""What stands in front of the layers of an encoder, and behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.batch import NO_PAIR, Batch
from mpotrain.engine.megatron.placement import placement_of
from mpotrain.engine.megatron.replicated import ReplicatedLinear, ReplicatedNorm
from mpotrain.engine.megatron.slots import LogicalModule, Slots
from mpotrain.engine.megatron.vocabulary import (
    VocabularyEmbedding,
    vocabulary_correct,
    vocabulary_logits,
    vocabulary_loss,
)
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.sites import Site
from mpotrain.nn.activation import activation

TOKENS = "token_embedding.weight"
"""Logical name of the matrix that embeds and predicts tokens."""


class EncoderEmbedding(LogicalModule):
    """Sum of token, position and segment embeddings, normalised and mapped to the hidden size.

    All but the look-up of tokens is computed alike on all tensor-parallel ranks.
    """

    def __init__(
        self,
        model: EncoderConfig,
        config: TransformerConfig,
        slots: Slots,
        sites: Mapping[str, Site],
    ) -> None:
        """Make the parameters.

        Args:
            model: of the encoder.
            config: of megatron-core's modules.
            slots: of the chunk.
            sites: of the encoder by name.
        """
        super().__init__()
        self.dropout, self.dtype = model.dropout, config.params_dtype
        self.tokens = VocabularyEmbedding(
            slots, TOKENS, model.vocab_size, model.embedding_width, config
        )
        slots.add(self, "positions", "position_embedding")
        slots.add(self, "types", "type_embedding")
        self.norm = ReplicatedNorm(slots, "embedding_norm", model.norm_eps)
        has_map = model.embedding_size is not None
        self.map = ReplicatedLinear(slots, sites["embedding_map"]) if has_map else None

    def forward(self, batch: Batch) -> Tensor:
        """Embed tokens (B, T).

        Args:
            batch: `inputs` and `positions`, and where they are there `token_types`.

        Returns:
            (T, B, H), the same on all tensor-parallel ranks.
        """
        x = self.tokens(batch.inputs).to(self.dtype)
        table, types = self.read("positions").to(x.dtype), self.read("types").to(x.dtype)
        assert batch.positions is not None
        x = x + functional.embedding(batch.positions, table)
        segments = batch.token_types
        x = x + (types[0] if segments is None else functional.embedding(segments, types))
        x = functional.dropout(self.norm(x), self.dropout, self.training)
        mapped: Tensor = x if self.map is None else self.map(x)
        return mapped.transpose(0, 1).contiguous()


class PairHead(LogicalModule):
    """Pooler and classifier for the order of two segments (Lan et al. 2020, section 3.1)."""

    def __init__(self, slots: Slots, sites: Mapping[str, Site]) -> None:
        """Make the parameters; arguments as of `EncoderEmbedding`."""
        super().__init__()
        self.pooler = ReplicatedLinear(slots, sites["pooler"])
        self.classifier = ReplicatedLinear(slots, sites["pair_head"])

    def forward(self, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed cross-entropy of all pairs, and the pair statistics.

        Args:
            rows: hidden states (B, T, H).
            batch: `pair_labels` of these positions; None = there is no pair.
        """
        labels = batch.pair_labels
        if labels is None:
            labels = torch.full_like(batch.inputs, NO_PAIR)
        chosen = labels != NO_PAIR
        scores, wanted = self.classifier(torch.tanh(self.pooler(rows[chosen]))), labels[chosen]
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        loss = functional.cross_entropy(wide, wanted, reduction="sum")
        return loss, {
            "pair_loss": loss.detach(),
            "pair_correct": (scores.detach().argmax(-1) == wanted).sum(),
            "num_pairs": chosen.sum(),
        }


class EncoderHead(LogicalModule):
    """Predicts masked tokens and the order of segments; see `mpotrain.models.encoder`.

    All but the scores of the vocabulary is computed alike on all tensor-parallel ranks.
    """

    def __init__(
        self,
        model: EncoderConfig,
        config: TransformerConfig,
        slots: Slots,
        sites: Mapping[str, Site],
    ) -> None:
        """Make the parameters; arguments as of `EncoderEmbedding`."""
        super().__init__()
        self.vocab_size = model.vocab_size
        is_pre = model.norm == "pre"
        self.final_norm = ReplicatedNorm(slots, "final_norm", model.norm_eps) if is_pre else None
        self.transform = ReplicatedLinear(slots, sites["mlm_head.transform"])
        self.norm = ReplicatedNorm(slots, "mlm_head.norm", model.norm_eps)
        # The scores alone are used of it: where the chunk embeds too, the matrix is in the bank.
        self.tokens = VocabularyEmbedding(
            slots, TOKENS, model.vocab_size, model.embedding_width, config
        )
        cuts = placement_of(cast("nn.Parameter", self.tokens.read("weight"))).cuts
        slots.add(self, "bias", "mlm_head.bias", *cuts)
        self.pairs = PairHead(slots, sites) if model.pair_head else None
        self._activation = activation(model.activation)

    def forward(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute what is differentiated.

        Args:
            hidden: (T, B, H), the same on all tensor-parallel ranks.
            batch: what belongs to these positions: `targets`, `loss_mask`, and with a pair head
                `pair_labels` and `pair_weight`.

        Returns:
            The objective, a sum, as a wide scalar; the summed loss of the targets ("loss_sum") and
            the statistics of the encoder, detached.
        """
        rows = hidden.transpose(0, 1)
        if self.final_norm is not None:
            rows = self.final_norm(rows)
        objective, sums = self._token_loss(rows, batch)
        if self.pairs is not None:
            pair_loss, told = self.pairs(rows, batch)
            sums |= told
            if self.training:
                assert batch.pair_weight is not None
                objective = objective + pair_loss * batch.pair_weight
        return objective, sums

    def _token_loss(self, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # Without any target these are no rows, through which all parameters still get a gradient.
        chosen = rows[batch.loss_mask]
        targets = batch.targets[batch.loss_mask]
        scored = self.norm(self._activation(self.transform(chosen)))
        weight = self.tokens.awaited("weight")
        scores = vocabulary_logits(scored, weight, self.read("bias"))
        loss = vocabulary_loss(scores, targets, self.vocab_size).sum()
        sums = {"loss_sum": loss.detach()}
        if not self.training:
            sums["correct"] = vocabulary_correct(scores, targets, self.vocab_size).sum()
        return loss, sums
