"""A pretrained encoder with a classifier in place of its pretraining heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mpotrain.batch import Batch, LossOutput
from mpotrain.models.building import SiteBuilder
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.nn.linear import DenseLinear

HEADS = ("mlm_head", "pair_head")
"""Modules of an encoder that serve its pretraining alone."""


class Classifier(Encoder):
    """Predicts a class, or a number, from the first token of a sequence (Devlin et al. 2019).

    All weights of the encoder keep their names, so that a checkpoint of the encoder is one of the
    classifier but for the heads. It is an encoder, instead of owning one, because an engine that
    splits weights gathers those of a module (positions, shared central tensors) around its call.

    Attributes:
        num_outputs: classes C; 1 for a regression.
        classifier: scores (B, C) of the pooled first token.
        added_parameters: names of the parameters that no pretrained encoder has.
    """

    classifier: DenseLinear

    def __init__(
        self,
        config: EncoderConfig,
        *,
        num_outputs: int,
        head_dropout: float,
        seed: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build the network; every parameter is drawn from its own generator.

        Args:
            config: of the pretrained encoder.
            num_outputs: classes, or 1 for a regression.
            head_dropout: dropout before the classifier.
            seed: of the start weights.
            compute_dtype: dtype of the activations; the loss is computed in fp32 at least.
        """
        super().__init__(config, seed=seed, compute_dtype=compute_dtype)
        for head in HEADS:
            setattr(self, head, None)
        self.num_outputs, self._head_dropout = num_outputs, head_dropout
        build = SiteBuilder(config, seed)
        hidden, std = config.hidden_size, config.init_std
        added = {"classifier": (hidden, num_outputs)}
        if not config.pair_head:
            added["pooler"] = (hidden, hidden)
        for name, (rows, columns) in added.items():
            generator = build.generator(name)
            setattr(self, name, DenseLinear(rows, columns, bias=True, std=std, generator=generator))
        self.added_parameters = frozenset(
            f"{name}.{leaf}" for name in added for leaf in ("weight", "bias")
        )

    def forward(self, batch: Batch, *, return_logits: bool = False) -> LossOutput:
        """Compute the summed loss of a micro-batch: cross-entropy, or squared error.

        Args:
            batch: token ids (B, T) with `document_ids` 0 at padding; targets (B, 1), int64 classes
                or float32 values; loss_mask (B, 1).
            return_logits: also return the scores (B, C), in fp32.

        Returns:
            Sum over the rows that count, and their number. In evaluation also statistics: `correct`
            and `confusion` (C, C), rows the true classes; or `moments` (5,), the float64 sums of
            x, y, x^2, y^2 and xy of predictions x and values y.
        """
        pooled = self.pooled(self.hidden(batch))
        pooled = functional.dropout(pooled, self._head_dropout, self.training)
        scores: Tensor = self.classifier(pooled)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        counts, targets = batch.loss_mask[:, 0], batch.targets[:, 0]
        if self.num_outputs == 1:
            loss_sum = (scores[:, 0] - targets)[counts].square().sum()
        else:
            targets = targets.masked_fill(~counts, -100)
            loss_sum = functional.cross_entropy(scores, targets, ignore_index=-100, reduction="sum")
        return LossOutput(
            loss_sum=loss_sum,
            num_tokens=counts.sum(),
            logits=scores if return_logits else None,
            statistics=None if self.training else self._statistics(scores, targets, counts),
        )

    def _statistics(self, scores: Tensor, targets: Tensor, counts: Tensor) -> dict[str, Tensor]:
        if self.num_outputs == 1:
            x, y = scores[counts, 0].double(), targets[counts].double()
            sums = [x.sum(), y.sum(), x @ x, y @ y, x @ y]
            return {"moments": torch.stack(sums)}
        true, predicted = targets[counts], scores[counts].argmax(dim=-1)
        pairs = true * self.num_outputs + predicted
        confusion = torch.zeros(self.num_outputs**2, dtype=torch.int64, device=pairs.device)
        # index_add_ has a deterministic kernel on CUDA, bincount has none.
        confusion.index_add_(0, pairs, torch.ones_like(pairs))
        confusion = confusion.view(self.num_outputs, self.num_outputs)
        return {"correct": confusion.trace(), "confusion": confusion}
