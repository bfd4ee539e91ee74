"""What one stage of the pipeline holds of GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn import functional

from mpotrain.batch import Batch
from mpotrain.engine.megatron.gpt_sources import norm_source
from mpotrain.engine.megatron.kernels import NO_KERNELS, Kernels
from mpotrain.engine.megatron.layer import layer_block
from mpotrain.engine.megatron.micro import Micro, positions_of_rank
from mpotrain.engine.megatron.norm import norm
from mpotrain.engine.megatron.slots import LogicalModule, Slots
from mpotrain.engine.megatron.sources import LayerSource
from mpotrain.engine.megatron.vocabulary import (
    VocabularyEmbedding,
    counted_loss,
    vocabulary_logits,
)
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.nn.attention import document_mask


class PositionTable(LogicalModule):
    """Learned positions; every tensor-parallel rank looks all of them up."""

    def __init__(self, slots: Slots, name: str) -> None:
        super().__init__()
        slots.add(self, "weight", name)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the rows (..., H) of positions (...)."""
        return functional.embedding(positions, self.read("weight"))


class GPTChunk(MegatronModule):  # type: ignore[misc]
    """Some layers of GPT-2, with the embedding in front or the loss behind where they belong.

    Attributes:
        pre_process: whether the embedding is here.
        post_process: whether the last norm and the loss are here.
        vp_stage: number of the chunk on its stage; None without virtual stages.
        decoder: the layers.
        bank: tensors that several layers use (none in GPT-2).
    """

    def __init__(
        self,
        model: GPT2Config,
        config: TransformerConfig,
        slots: Slots,
        decoder: TransformerBlock,
        *,
        vp_stage: int | None,
        kernels: Kernels,
    ) -> None:
        """Join the layers with what stands at their ends; see `build_gpt`."""
        super().__init__(config=config)
        self.model, self.vp_stage = model, vp_stage
        self.pre_process, self.post_process = decoder.pre_process, decoder.post_process
        if self.pre_process or self.post_process:
            self.token_embedding = VocabularyEmbedding(
                slots, "token_embedding.weight", model.vocab_size, model.hidden_size, config
            )
        if self.pre_process:
            self.position_embedding = PositionTable(slots, "position_embedding")
        self.decoder = decoder  # modules in the order of the forward pass, as buckets want them
        if self.post_process:
            self.final_norm = build_module(
                norm(norm_source(slots, "final_norm"), kernels.norm),
                config=config,
                hidden_size=model.hidden_size,
                eps=config.layernorm_epsilon,
            )
        self.bank = slots.bank
        self._context = (
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """Take the hidden states of the stage in front; called by the schedule."""
        one = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(one)

    def forward(self, batch: Batch, micro: Micro) -> Tensor:
        """Compute this chunk's part of a micro-batch.

        Args:
            batch: the whole micro-batch.
            micro: what accompanies it.

        Returns:
            Hidden states (s, b, h) for the next stage; on the last one the summed loss of the
            targets at this rank's positions, a scalar.
        """
        length = batch.inputs.shape[1]
        mine = positions_of_rank(length, *self._context, batch.inputs.device)
        if batch.document_ids is not None:
            seen = document_mask(batch.document_ids, batch.document_ids).tril()
            micro = replace(micro, seen=seen)
        hidden = self._embed(batch, mine) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, attention_bias=micro)
        if self.post_process:
            hidden = self._loss(hidden, batch, mine, micro)
        result: Tensor = hidden
        return result

    def _embed(self, batch: Batch, mine: Tensor) -> Tensor:
        """Return embedded tokens (s, b, h) of this rank's positions."""
        positions = mine if batch.positions is None else batch.positions[:, mine]
        x = self.token_embedding(batch.inputs[:, mine]) + self.position_embedding(positions)
        x = functional.dropout(x, self.model.dropout, self.training).transpose(0, 1).contiguous()
        scattered: Tensor = (
            scatter_to_sequence_parallel_region(x) if self.config.sequence_parallel else x
        )
        return scattered

    def _loss(self, hidden: Tensor, batch: Batch, mine: Tensor, micro: Micro) -> Tensor:
        normalised = self.final_norm(hidden)
        if self.config.sequence_parallel:
            # The logits bring every rank the whole gradient: each takes its own positions of it.
            normalised = gather_from_sequence_parallel_region(
                normalised, tensor_parallel_output_grad=False
            )
        rows = normalised.transpose(0, 1).flatten(0, 1)
        logits = vocabulary_logits(rows, self.token_embedding.awaited("weight"))
        targets = batch.targets[:, mine].flatten()
        counts = batch.loss_mask[:, mine].flatten()
        loss, sums = counted_loss(
            logits, targets, counts, self.model.vocab_size, training=self.training
        )
        micro.tally.sums.update(sums)
        return loss


def build_gpt(
    model: GPT2Config,
    config: TransformerConfig,
    slots: Slots,
    layers: Mapping[int, LayerSource],
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    kernels: Kernels = NO_KERNELS,
) -> GPTChunk:
    """Build a chunk; parameters are zeros until an engine loads them.

    Args:
        model: the network.
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
    return GPTChunk(model, config, slots, block, vp_stage=vp_stage, kernels=kernels)
