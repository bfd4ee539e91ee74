"""A depth-shared encoder in chunks of layers: BERT, ALBERT and MPOBERT over many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from mpotrain.batch import NO_PAIR, Batch
from mpotrain.engine.megatron.encoder_ends import EncoderEmbedding, EncoderHead
from mpotrain.engine.megatron.kernels import NO_KERNELS, Kernels
from mpotrain.engine.megatron.layer import layer_block
from mpotrain.engine.megatron.micro import Micro, positions_of_rank
from mpotrain.engine.megatron.slots import Slots
from mpotrain.engine.megatron.sources import LayerSource
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.nn.attention import document_mask


class EncoderChunk(MegatronModule):  # type: ignore[misc]
    """Some layers of an encoder, with the embeddings and the heads at its ends.

    Attributes:
        pre_process: whether it embeds tokens.
        post_process: whether it computes the loss.
        vp_stage: its number among the chunks of the stage; None where there is one.
        bank: owns what several of its layers use.
        encoder: the layers.
    """

    def __init__(
        self,
        model: EncoderConfig,
        config: TransformerConfig,
        slots: Slots,
        layers: TransformerBlock,
        *,
        vp_stage: int | None,
    ) -> None:
        """Join the layers with what stands at their ends; see `build_encoder`."""
        super().__init__(config=config)
        self.pre_process, self.post_process = layers.pre_process, layers.post_process
        self.vp_stage, self.bank, self.encoder = vp_stage, slots.bank, layers
        self.context_length = model.context_length
        sites = {site.name: site for site in model.all_sites()}
        self.embedding = EncoderEmbedding(model, config, slots, sites) if self.pre_process else None
        self.head = EncoderHead(model, config, slots, sites) if self.post_process else None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states of the chunk before, as megatron-core's schedules give them."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.encoder.set_input_tensor(input_tensor)

    def forward(self, batch: Batch, micro: Micro) -> Tensor:
        """Compute a micro-batch through this chunk.

        Args:
            batch: the whole sequences, the same on all ranks that compute this micro-batch.
            micro: what accompanies it; its tally takes "loss_sum" and the statistics of
                `mpotrain.models.encoder.Encoder`, over the positions of this context-parallel rank.

        Returns:
            Hidden states (T / (tp with sequence parallelism x cp), B, H), or from the last chunk
            the objective, a sum over the positions of this context-parallel rank.
        """
        self._check(batch)
        share, documents = self._share(batch), batch.document_ids
        seen = None if documents is None else document_mask(documents, documents)
        hidden: Tensor | None = None
        if self.embedding is not None:
            hidden = self.embedding(share)
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden)
        result: Tensor = self.encoder(
            hidden_states=hidden, attention_mask=None, attention_bias=replace(micro, seen=seen)
        )
        if self.head is not None:
            if self.config.sequence_parallel:
                # The heads' gradient is the same on all ranks: each keeps its positions of it.
                result = gather_from_sequence_parallel_region(
                    result, tensor_parallel_output_grad=False
                )
            result, sums = self.head(result, share)
            micro.tally.sums.update(sums)
        return result

    def _check(self, batch: Batch) -> None:
        length = batch.inputs.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"sequence of {length} tokens, but the model has {self.context_length} positions "
                "(model.context_length)"
            )

    def _share(self, batch: Batch) -> Batch:
        """Return what belongs to the positions of this context-parallel rank."""
        ranks = self.config.context_parallel_size
        rank = parallel_state.get_context_parallel_rank() if ranks > 1 else 0
        num_rows, length = batch.inputs.shape
        mine = positions_of_rank(length, ranks, rank, batch.inputs.device)

        def at_mine(fields: Tensor | None) -> Tensor | None:
            return None if fields is None else fields[:, mine]

        positions = at_mine(batch.positions)
        return replace(
            batch,
            inputs=batch.inputs[:, mine],
            targets=batch.targets[:, mine],
            loss_mask=batch.loss_mask[:, mine],
            positions=mine.expand(num_rows, -1) if positions is None else positions,
            token_types=at_mine(batch.token_types),
            pair_labels=at_mine(batch.pair_labels),
            pair_weight=_pair_weight(batch),
        )


def build_encoder(
    model: EncoderConfig,
    config: TransformerConfig,
    slots: Slots,
    layers: Mapping[int, LayerSource],
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    kernels: Kernels = NO_KERNELS,
) -> EncoderChunk:
    """Build a chunk; parameters are zeros until an engine loads them.

    Args:
        model: of the encoder.
        config: of megatron-core's modules.
        slots: makes the parameters.
        layers: sources of its layers by number, in their order.
        pre_process: whether the chunk embeds tokens.
        post_process: whether it computes the loss.
        vp_stage: its number among the chunks of the stage; None where there is one.
        kernels: compute parts of the layers in place of PyTorch.
    """
    block = layer_block(
        config, layers, kernels,
        pre_process=pre_process, post_process=post_process, vp_stage=vp_stage,
    )  # fmt: skip
    return EncoderChunk(model, config, slots, block, vp_stage=vp_stage)


def _pair_weight(batch: Batch) -> Tensor:
    """Return what the loss of a pair counts; alone, a micro-batch is the whole batch."""
    if batch.pair_weight is not None:
        return batch.pair_weight
    labels = batch.pair_labels
    num_tokens = batch.loss_mask.sum()
    num_pairs = torch.zeros_like(num_tokens) if labels is None else (labels != NO_PAIR).sum()
    return num_tokens / num_pairs.clamp_min(1)
