"""GPT-2 with any of its weight matrices tensorized (Radford et al. 2019; Chekalina et al. 2023)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpotrain.batch import Batch, LossOutput
from mpotrain.models.config import GPT2Config
from mpotrain.models.sites import Site
from mpotrain.nn.attention import CausalSelfAttention
from mpotrain.nn.block import AUXILIARY_LOSS, Block, FeedForward, LayerNorm
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.linear import DenseEmbedding, DenseLinear, TensorizedEmbedding, TensorizedLinear
from mpotrain.nn.moe.config import AsymmetricExpertSite, MoEConfig, MPOExpertSite
from mpotrain.nn.moe.dispatch import LocalDispatcher
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.moe.router import Router


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
            Sum over the targets that count, in fp32, and their number. With mixtures of experts
            also their statistics, stacked over the mixtures in block order: (L, E) or (L,), and in
            training their auxiliary losses times the number of targets.
        """
        hidden, mixtures = self._trunk(batch.inputs)
        logits = self.logits(hidden)
        targets = batch.targets.masked_fill(~batch.loss_mask, -100)
        loss_sum = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        num_tokens = batch.loss_mask.sum()
        auxiliary = None
        if mixtures and self.training:
            # A mean over the micro-batch's tokens becomes a sum, as every loss is.
            auxiliary = torch.stack([m[AUXILIARY_LOSS] for m in mixtures]).sum() * num_tokens
        return LossOutput(
            loss_sum=loss_sum,
            num_tokens=num_tokens,
            logits=logits.float() if return_logits else None,
            auxiliary_sum=auxiliary,
            statistics=_stack(mixtures),
        )

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the normalised last hidden state (B, T, H) of tokens (B, T), T <= context."""
        return self._trunk(tokens)[0]

    def _trunk(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the last hidden state, and what each mixture of experts tells."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"sequence of {length} tokens, but the model has "
                f"{self.config.context_length} positions (model.context_length)"
            )
        x = self.token_embedding(tokens, self.compute_dtype)
        x = x + self.position_embedding[:length].to(self.compute_dtype)
        x = functional.dropout(x, self.config.dropout, self.training)
        mixtures = []
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x, told = checkpoint(block, x, use_reentrant=False)
            else:
                x, told = block(x)
            if told:
                mixtures.append(told)
        normalised: Tensor = self.final_norm(x)
        return normalised, mixtures

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of all tokens for hidden states (..., H)."""
        scores: Tensor = self.token_embedding.logits(hidden)
        return scores

    def _generator(self, name: str) -> torch.Generator:
        # crc32 is stable over processes and Python versions, unlike hash().
        return torch.Generator().manual_seed((self._seed << 32) ^ zlib.crc32(name.encode()))

    def _embedding(self, site: Site) -> DenseEmbedding | TensorizedEmbedding:
        std, generator = self.config.site_std(site.family), self._generator(site.name)
        if isinstance(site.choice, MPOSite | TTMSite) and site.spec is not None:
            return TensorizedEmbedding(site.spec, site.choice, std=std, generator=generator)
        return DenseEmbedding(site.in_features, site.out_features, std=std, generator=generator)

    def _linear(self, site: Site) -> DenseLinear | TensorizedLinear:
        std, generator = self.config.site_std(site.family), self._generator(site.name)
        if isinstance(site.choice, MPOSite | TTMSite) and site.spec is not None:
            return TensorizedLinear(
                site.spec, site.choice, bias=site.bias, std=std, generator=generator
            )
        return DenseLinear(
            site.in_features,
            site.out_features,
            bias=site.bias,
            std=std,
            generator=generator,
        )

    def _experts(self, site: Site) -> DenseExperts | MPOExperts:
        std, generator = self.config.site_std(site.family), self._generator(site.name)
        if isinstance(site.choice, MPOExpertSite | AsymmetricExpertSite) and site.spec is not None:
            return MPOExperts(
                site.spec,
                site.choice,
                site.num_experts,
                bias=site.bias,
                std=std,
                generator=generator,
            )
        return DenseExperts(
            site.in_features,
            site.out_features,
            site.num_experts,
            bias=site.bias,
            std=std,
            generator=generator,
        )

    def _mixture(self, moe: MoEConfig, prefix: str, sites: dict[str, Site]) -> MixtureOfExperts:
        router = sites[f"{prefix}.router"]
        return MixtureOfExperts(
            Router(
                router.in_features,
                moe.num_experts,
                moe.router,
                std=self.config.site_std(router.family),
                generator=self._generator(router.name),
            ),
            self._experts(sites[f"{prefix}.c_fc"]),
            self._experts(sites[f"{prefix}.c_proj"]),
            LocalDispatcher(moe.num_experts),
        )

    def _block(self, layer: int, sites: dict[str, Site]) -> Block:
        config, prefix = self.config, f"blocks.{layer}"
        attention = CausalSelfAttention(
            self._linear(sites[f"{prefix}.attention.qkv"]),
            self._linear(sites[f"{prefix}.attention.out"]),
            num_heads=config.num_heads,
            dropout=config.attention_dropout,
        )
        ffn: nn.Module
        if config.moe is not None and layer in config.mixture_layers():
            ffn = self._mixture(config.moe, f"{prefix}.ffn", sites)
        else:
            ffn = FeedForward(
                self._linear(sites[f"{prefix}.ffn.c_fc"]),
                self._linear(sites[f"{prefix}.ffn.c_proj"]),
            )
        return Block(attention, ffn, hidden_size=config.hidden_size, dropout=config.dropout)


def _stack(mixtures: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Return the statistics of all mixtures by name, stacked in block order."""
    if not mixtures:
        return None
    names = [name for name in mixtures[0] if name != AUXILIARY_LOSS]
    return {name: torch.stack([told[name] for told in mixtures]) for name in names}
