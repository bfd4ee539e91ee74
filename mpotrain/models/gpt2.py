"""GPT-2 with any of its weight matrices tensorized (Radford et al. 2019; Chekalina et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpotrain.batch import Batch, LossOutput
from mpotrain.models.building import SiteBuilder
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.models.sites import Site
from mpotrain.models.token_loss import token_loss
from mpotrain.nn.attention import CausalSelfAttention, document_mask
from mpotrain.nn.block import Block, FeedForward
from mpotrain.nn.norm import LayerNorm


class GPT2(nn.Module):
    """Decoder-only language model: learned positions, pre-norm blocks, tied embedding.

    Attributes:
        config: sizes and the representation of each site.
        compute_dtype: dtype of the activations; losses are computed in fp32.
    """

    def __init__(
        self, config: GPT2Config, *, seed: int, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        """Build the model with weights drawn from `seed`.

        Every parameter is drawn from its own generator, seeded by (seed, logical name): adding or
        changing one site leaves the start values of all others as they were.
        """
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        build = SiteBuilder(config, seed)
        sites = {site.name: site for site in config.all_sites()}
        self.token_embedding = build.embedding(sites["token_embedding"])
        positions = torch.empty(config.context_length, config.hidden_size)
        generator = build.generator("position_embedding")
        # GPT-2's own code draws positions with half the deviation of the other matrices;
        # the published re-implementations use init_std throughout, and so do we.
        self.position_embedding = nn.Parameter(
            positions.normal_(0.0, config.init_std, generator=generator)
        )
        self.blocks = nn.ModuleList(self._block(n, sites, build) for n in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size)

    def forward(self, batch: Batch, *, return_logits: bool = False) -> LossOutput:
        """Compute the summed next-token cross-entropy of a micro-batch.

        Args:
            batch: token ids (B, T) with their targets and loss mask.
            return_logits: also return the scores (B, T, V) in fp32.

        Returns:
            Sum over the targets that count, in fp32, and their number. With mixtures of experts
            also their statistics, stacked over the mixtures in block order: (L, E) or (L,), and in
            training their auxiliary losses times the number of targets; in evaluation how many
            targets have the highest score.
        """
        hidden, mixtures = self._trunk(batch.inputs, batch.positions, batch.document_ids)
        return token_loss(
            self.logits(hidden),
            batch,
            mixtures,
            training=self.training,
            return_logits=return_logits,
        )

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the normalised last hidden state (B, T, H) of tokens (B, T), T <= context."""
        return self._trunk(tokens)[0]

    def _trunk(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the last hidden state, and what each mixture of experts tells."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"sequence of {length} tokens, but the model has "
                f"{self.config.context_length} positions (model.context_length)"
            )
        x = self.token_embedding(tokens, self.compute_dtype)
        table = self.position_embedding.to(self.compute_dtype)
        x = x + (table[:length] if positions is None else functional.embedding(positions, table))
        x = functional.dropout(x, self.config.dropout, self.training)
        mixtures = []
        mask = None if documents is None else document_mask(documents, documents).tril()
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x, told = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x, told = block(x, mask)
            if told:
                mixtures.append(told)
        normalised: Tensor = self.final_norm(x)
        return normalised, mixtures

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of all tokens for hidden states (..., H)."""
        scores: Tensor = self.token_embedding.logits(hidden)
        return scores

    def _block(self, layer: int, sites: dict[str, Site], build: SiteBuilder) -> Block:
        config, prefix = self.config, f"blocks.{layer}"
        attention = CausalSelfAttention(
            build.linear(sites[f"{prefix}.attention.qkv"]),
            build.linear(sites[f"{prefix}.attention.out"]),
            num_heads=config.num_heads,
            dropout=config.attention_dropout,
        )
        ffn: nn.Module
        if config.moe is not None and layer in config.mixture_layers():
            ffn = build.mixture(config.moe, f"{prefix}.ffn", sites)
        else:
            ffn = FeedForward(
                build.linear(sites[f"{prefix}.ffn.c_fc"]),
                build.linear(sites[f"{prefix}.ffn.c_proj"]),
            )
        return Block(attention, ffn, hidden_size=config.hidden_size, dropout=config.dropout)
