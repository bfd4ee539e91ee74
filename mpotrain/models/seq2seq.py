"""T5 v1.0 with any of its weight matrices tensorized (Raffel et al. 2020; Gao et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpotrain.batch import Batch, LossOutput
from mpotrain.models.building import SiteBuilder
from mpotrain.models.sites import Site
from mpotrain.models.t5_config import MODULES, T5Config
from mpotrain.models.token_loss import token_loss
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.relative_bias import RelativeBias
from mpotrain.nn.t5_block import RMSNorm, T5Attention, T5Block, T5FeedForward
from mpotrain.nn.t5_stack import T5Stack


class T5(nn.Module):
    """Encoder and decoder with relative positions and one embedding, tied to the output layer.

    Attributes:
        config: sizes and the representation of each site.
        compute_dtype: dtype of the activations; losses are computed in fp32.
        token_embedding: of the tokens of both stacks, and the output layer.
        encoder: reads the source.
        decoder: reads the target up to each position, and what the encoder returns.
    """

    def __init__(
        self, config: T5Config, *, seed: int, compute_dtype: torch.dtype = torch.float32
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
        self.encoder = self._stack("encoder", sites, build)
        self.decoder = self._stack("decoder", sites, build)

    def forward(self, batch: Batch, *, return_logits: bool = False) -> LossOutput:
        """Compute the summed cross-entropy of the targets of a micro-batch.

        Args:
            batch: tokens of the encoder (B, S) in `encoder_inputs`, those of the decoder (B, T) in
                `inputs`, with their targets and loss mask; with document ids of both, a token sees
                its own document alone, in either sequence.
            return_logits: also return the scores (B, T, V) in fp32.

        Returns:
            Sum over the targets that count, in fp32, and their number; in evaluation also how many
            of them have the highest score. With mixtures of experts also their statistics, stacked
            in the order of `T5Config.mixtures`: (L, E) or (L,), and in training their auxiliary
            losses, each a mean over the tokens that meet it, times the number of targets.

        Raises:
            ValueError: the batch has no tokens for the encoder, or document ids of one sequence.
        """
        if batch.encoder_inputs is None:
            raise ValueError(
                "a batch without encoder_inputs, but a t5 model has an encoder that reads them; "
                'train it with data.objective = {kind = "span_corruption"}'
            )
        memory, mixtures = self._encode(batch.encoder_inputs, batch.encoder_document_ids)
        hidden, more = self._decode(
            batch.inputs, memory, batch.document_ids, batch.encoder_document_ids
        )
        return token_loss(
            self.logits(hidden),
            batch,
            mixtures + more,
            training=self.training,
            return_logits=return_logits,
        )

    def encode(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return what the decoder reads of a source.

        Args:
            tokens: (B, S).
            documents: document of each token (B, S); None = a row is one document.

        Returns:
            (B, S, H). Text is written by encoding once and decoding again for each new token.
        """
        return self._encode(tokens, documents)[0]

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor,
        documents: Tensor | None = None,
        memory_documents: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised last hidden state of the decoder.

        Args:
            tokens: (B, T), beginning with the start token.
            memory: what `encode` returned (B, S, H).
            documents: document of each token (B, T); None = a row is one document.
            memory_documents: document of each token of the source (B, S).

        Returns:
            (B, T, H), of which `logits` makes scores.

        Raises:
            ValueError: document ids of one sequence alone.
        """
        return self._decode(tokens, memory, documents, memory_documents)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of all tokens for hidden states (..., H) of the decoder."""
        # Rows of the embedding have unit deviation; the output layer wants it 1 / sqrt(H).
        scores: Tensor = self.token_embedding.logits(hidden * self.config.hidden_size**-0.5)
        return scores

    def _encode(
        self, tokens: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        embedded = self.token_embedding(tokens, self.compute_dtype)
        result: tuple[Tensor, list[dict[str, Tensor]]] = self.encoder(embedded, documents)
        return result

    def _decode(
        self,
        tokens: Tensor,
        memory: Tensor,
        documents: Tensor | None,
        memory_documents: Tensor | None,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        if (documents is None) != (memory_documents is None):
            raise ValueError(
                "document ids of one sequence alone; give those of source and target, or neither"
            )
        embedded = self.token_embedding(tokens, self.compute_dtype)
        result: tuple[Tensor, list[dict[str, Tensor]]] = self.decoder(
            embedded, documents, memory, memory_documents
        )
        return result

    def _stack(self, stack: str, sites: dict[str, Site], build: SiteBuilder) -> T5Stack:
        config, name = self.config, f"{stack}.relative_bias.weight"
        causal = stack == "decoder"
        relative_bias = RelativeBias(
            config.relative_buckets,
            config.relative_distance,
            config.num_heads,
            bidirectional=not causal,
            # The deviation of T5's code: that of keys and values.
            std=config.site_std("key"),
            generator=build.generator(name),
        )
        prefixes = [f"{stack}.blocks.{layer}" for layer in range(config.stacks[stack])]
        return T5Stack(
            relative_bias,
            [self._block(prefix, sites, build, cross=causal) for prefix in prefixes],
            RMSNorm(config.hidden_size, config.norm_eps),
            causal=causal,
            dropout=config.dropout,
            checkpointing=config.activation_checkpointing,
        )

    def _block(
        self, prefix: str, sites: dict[str, Site], build: SiteBuilder, *, cross: bool
    ) -> T5Block:
        config = self.config

        def attention(name: str) -> T5Attention:
            query, key, value, out = (
                build.linear(sites[f"{prefix}.{name}.{module}"]) for module in MODULES.values()
            )
            return T5Attention(
                query, key, value, out, num_heads=config.num_heads, dropout=config.dropout
            )

        ffn: T5FeedForward | MixtureOfExperts
        if config.moe is not None and f"{prefix}.ffn.router" in sites:
            ffn = build.mixture(config.moe, f"{prefix}.ffn", sites, "relu")
        else:
            ffn = T5FeedForward(
                build.linear(sites[f"{prefix}.ffn.c_fc"]),
                build.linear(sites[f"{prefix}.ffn.c_proj"]),
                dropout=config.dropout,
            )
        return T5Block(
            attention("attention"),
            attention("cross_attention") if cross else None,
            ffn,
            hidden_size=config.hidden_size,
            eps=config.norm_eps,
            dropout=config.dropout,
        )
