"""GPT-2 with any of its weight matrices tensorized (Radford et al. 2019; Chekalina et al. 2023)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpotrain.batch import Batch, LossOutput
from mpotrain.models.config import GPT2Config, Site
from mpotrain.nn.attention import CausalSelfAttention
from mpotrain.nn.block import Block, FeedForward, LayerNorm
from mpotrain.nn.config import DenseSite
from mpotrain.nn.linear import DenseEmbedding, DenseLinear, TensorizedEmbedding, TensorizedLinear


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
        self.config, self.compute_dtype, self._seed = config, compute_dtype, seed
        sites = {site.name: site for site in config.all_sites()}
        self.token_embedding = self._embedding(sites["token_embedding"])
        positions = torch.empty(config.context_length, config.hidden_size)
        generator = self._generator("position_embedding")
        # GPT-2's own code draws positions with half the deviation of the other matrices;
        # the published re-implementations use init_std throughout, and so do we.
        self.position_embedding = nn.Parameter(
            positions.normal_(0.0, config.init_std, generator=generator)
        )
        self.blocks = nn.ModuleList(self._block(n, sites) for n in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size)

    def forward(self, batch: Batch, *, return_logits: bool = False) -> LossOutput:
        """Compute the summed next-token cross-entropy of a micro-batch.

        Args:
            batch: token ids (B, T) with their targets and loss mask.
            return_logits: also return the scores (B, T, V) in fp32.

        Returns:
            Sum over the targets that count, in fp32, and their number.
        """
        logits = self.logits(self.hidden(batch.inputs))
        targets = batch.targets.masked_fill(~batch.loss_mask, -100)
        loss_sum = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        return LossOutput(
            loss_sum=loss_sum,
            num_tokens=batch.loss_mask.sum(),
            logits=logits.float() if return_logits else None,
        )

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the normalised last hidden state (B, T, H) of tokens (B, T), T <= context."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"sequence of {length} tokens, but the model has "
                f"{self.config.context_length} positions (model.context_length)"
            )
        x = self.token_embedding(tokens, self.compute_dtype)
        x = x + self.position_embedding[:length].to(self.compute_dtype)
        x = functional.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        normalised: Tensor = self.final_norm(x)
        return normalised

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of all tokens for hidden states (..., H)."""
        scores: Tensor = self.token_embedding.logits(hidden)
        return scores

    def _generator(self, name: str) -> torch.Generator:
        # crc32 is stable over processes and Python versions, unlike hash().
        return torch.Generator().manual_seed((self._seed << 32) ^ zlib.crc32(name.encode()))

    def _embedding(self, site: Site) -> DenseEmbedding | TensorizedEmbedding:
        std, generator = self.config.site_std(site.family), self._generator(site.name)
        if isinstance(site.choice, DenseSite) or site.spec is None:
            return DenseEmbedding(site.in_features, site.out_features, std=std, generator=generator)
        return TensorizedEmbedding(site.spec, site.choice, std=std, generator=generator)

    def _linear(self, site: Site) -> DenseLinear | TensorizedLinear:
        std, generator = self.config.site_std(site.family), self._generator(site.name)
        if isinstance(site.choice, DenseSite) or site.spec is None:
            return DenseLinear(
                site.in_features,
                site.out_features,
                bias=site.bias,
                std=std,
                generator=generator,
            )
        return TensorizedLinear(
            site.spec, site.choice, bias=site.bias, std=std, generator=generator
        )

    def _block(self, layer: int, sites: dict[str, Site]) -> Block:
        config, prefix = self.config, f"blocks.{layer}"
        attention = CausalSelfAttention(
            self._linear(sites[f"{prefix}.attention.qkv"]),
            self._linear(sites[f"{prefix}.attention.out"]),
            num_heads=config.num_heads,
            dropout=config.attention_dropout,
        )
        ffn = FeedForward(
            self._linear(sites[f"{prefix}.ffn.c_fc"]),
            self._linear(sites[f"{prefix}.ffn.c_proj"]),
        )
        return Block(attention, ffn, hidden_size=config.hidden_size, dropout=config.dropout)
