"""T5 cut over tensor-, expert- and data-parallel ranks: both stacks in one chunk.

Megatron-core's schedules no longer carry two stacks through a pipeline, so there is one stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from torch import Tensor
from torch.nn import functional

from mpotrain.batch import Batch
from mpotrain.engine.megatron.feature_cuts import feature_periods
from mpotrain.engine.megatron.head_bias import HeadBias, memory_terms, self_terms
from mpotrain.engine.megatron.kernels import NO_KERNELS, Kernels
from mpotrain.engine.megatron.layer import layer_spec
from mpotrain.engine.megatron.micro import Micro
from mpotrain.engine.megatron.norm import norm
from mpotrain.engine.megatron.placement import Cut
from mpotrain.engine.megatron.seq2seq_sources import T5Sources
from mpotrain.engine.megatron.slots import Slots
from mpotrain.engine.megatron.vocabulary import (
    VocabularyEmbedding,
    counted_loss,
    vocabulary_logits,
)
from mpotrain.models.t5_config import T5Config
from mpotrain.tensor.cached import StepCache


class T5Chunk(MegatronModule):  # type: ignore[misc]
    """Encoder and decoder with one embedding, which is also the output layer.

    Attributes:
        pre_process: true: tokens are embedded here.
        post_process: true: the loss is computed here.
        vp_stage: None: the stage has no other chunk.
        bank: owns what several layers use: nothing.
        token_embedding: of the tokens of both stacks, and the output layer.
        encoder_bias: relative positions in the encoder.
        decoder_bias: relative positions in the decoder.
        encoder: reads the source.
        decoder: reads the target up to each position, and what the encoder returns.
    """

    pre_process, post_process, vp_stage = True, True, None
    # What megatron-core's schedules and the reduction of gradients ask a network.
    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        model: T5Config,
        config: TransformerConfig,
        slots: Slots,
        blocks: Mapping[str, TransformerBlock],
        tables: Mapping[str, HeadBias],
    ) -> None:
        """Join the parts; see `build_t5`.

        Args:
            model: the network.
            config: of megatron-core's modules.
            slots: makes the parameters.
            blocks: layers and last norm of "encoder" and "decoder".
            tables: relative positions of both.
        """
        super().__init__(config=config)
        self.model, self.bank = model, slots.bank
        self.token_embedding = VocabularyEmbedding(
            slots, "token_embedding.weight", model.vocab_size, model.hidden_size, config
        )
        self.encoder_bias, self.encoder = tables["encoder"], blocks["encoder"]
        self.decoder_bias, self.decoder = tables["decoder"], blocks["decoder"]

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take what the stage in front sends: nothing, this is the only one.

        Raises:
            ValueError: something was sent.
        """
        given = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if any(tensor is not None for tensor in given):
            raise ValueError("hidden states from another stage, but a T5 is not cut into stages")

    def forward(self, batch: Batch, micro: Micro) -> Tensor:
        """Compute the loss of a micro-batch.

        Args:
            batch: as `mpotrain.models.seq2seq.T5` takes it. Under sequence parallelism the lengths
                of source and target are both multiples of the tensor-parallel ranks.
            micro: what accompanies it; its tally takes "loss_sum", and in evaluation "correct".

        Returns:
            Sum of the losses of the targets that count. Mixtures of experts add the gradient of
            their auxiliary losses where these arise.

        Raises:
            ValueError: the batch has no tokens for the encoder, document ids of one sequence, or a
                length that cannot be split.
        """
        source = batch.encoder_inputs
        if source is None:
            raise ValueError(
                "a batch without encoder_inputs, but a t5 model has an encoder that reads them; "
                'train it with data.objective = {kind = "span_corruption"}'
            )
        self._check_lengths(encoder_inputs=source, inputs=batch.inputs)
        documents, source_documents = batch.document_ids, batch.encoder_document_ids
        embedded = self.token_embedding(source)
        terms = self_terms(
            self.encoder_bias, embedded, source.shape[1], source_documents, causal=False
        )
        memory = self._stack(self.encoder, embedded, replace(micro, terms=terms))
        embedded = self.token_embedding(batch.inputs)
        terms = self_terms(
            self.decoder_bias, embedded, batch.inputs.shape[1], documents, causal=True
        )
        to_memory = memory_terms(embedded, documents, source_documents)
        micro = replace(micro, terms=terms, memory_terms=to_memory)
        return self._loss(self._stack(self.decoder, embedded, micro, memory), batch, micro)

    def _check_lengths(self, **sequences: Tensor) -> None:
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        for name, tokens in sequences.items():
            if tokens.shape[1] % ranks:
                raise ValueError(
                    f"{name}: {tokens.shape[1]} positions cannot be split over {ranks} ranks; "
                    "choose another data.sequence_length, or parallel.sequence=false"
                )

    def _stack(
        self, block: TransformerBlock, embedded: Tensor, micro: Micro, memory: Tensor | None = None
    ) -> Tensor:
        """Map embedded tokens (B, T, H) to normalised hidden states.

        With sequence parallelism the result and `memory` are this rank's positions alone: the
        layers that make keys and values of a memory gather it, as they gather any input, and leave
        to each rank the gradient of its own positions.

        Returns:
            (T or T / tp, B, H).
        """
        hidden = embedded.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        hidden = block(
            hidden_states=self._drop(hidden),
            attention_mask=None,
            context=memory,
            attention_bias=micro,
        )
        return self._drop(hidden)

    def _drop(self, x: Tensor) -> Tensor:
        """Drop elements: the same on all tensor-parallel ranks where these hold the same."""
        rate = self.model.dropout if self.training else 0.0
        if rate > 0 and self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                return functional.dropout(x, rate)
        return functional.dropout(x, rate)

    def _loss(self, hidden: Tensor, batch: Batch, micro: Micro) -> Tensor:
        if self.config.sequence_parallel:
            # The scores give every rank the whole gradient: each takes its own positions of it.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        # Rows of the embedding have unit deviation; the output layer wants it 1 / sqrt(H).
        rows = hidden.transpose(0, 1).flatten(0, 1) * self.model.hidden_size**-0.5
        logits = vocabulary_logits(rows, self.token_embedding.awaited("weight"))
        targets, counts = batch.targets.flatten(), batch.loss_mask.flatten()
        loss, sums = counted_loss(
            logits, targets, counts, self.model.vocab_size, training=self.training
        )
        micro.tally.sums.update(sums)
        return loss


def build_t5(
    model_config: T5Config,
    transformer_config: TransformerConfig,
    slots: Slots,
    *,
    cache: StepCache | None = None,
    kernels: Kernels = NO_KERNELS,
) -> T5Chunk:
    """Build the chunk; all parameters are zeros until an engine loads them.

    Args:
        model_config: the network.
        transformer_config: of megatron-core's modules, see `settings.transformer_config`.
        slots: makes the parameters.
        cache: of the rebuilt matrices of a step; None = every pass rebuilds them.
        kernels: compute parts of the layers in place of PyTorch; attentions always have terms on
            their scores here, so PyTorch computes these.
    """
    model, config = model_config, transformer_config
    kernels = replace(kernels, core=None)
    ranks = config.tensor_model_parallel_size
    periods = feature_periods(model, ranks, config.expert_tensor_parallel_size)
    sources = T5Sources(model, slots, periods, cache=cache)
    # Heads are shared out as their features are.
    period = periods.attention // model.head_size
    heads = Cut(1, ranks, parallel_state.get_tensor_model_parallel_rank(), period)
    blocks, tables = {}, {}
    for stack, depth in model.stacks.items():
        tables[stack] = HeadBias(
            slots,
            f"{stack}.relative_bias.weight",
            num_buckets=model.relative_buckets,
            max_distance=model.relative_distance,
            bidirectional=stack == "encoder",
            heads=heads,
        )
        blocks[stack] = TransformerBlock(
            # Megatron-core knows one depth for each configuration.
            replace(config, num_layers=depth),
            TransformerBlockSubmodules(
                layer_specs=[layer_spec(source, kernels) for source in sources.layers(stack)],
                layer_norm=norm(sources.norm(f"{stack}.final_norm"), kernels.norm),
            ),
        )
    return T5Chunk(model, config, slots, blocks, tables)
