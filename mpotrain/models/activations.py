"""Memory of activations, predicted from the sizes of a network (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.models.t5_config import T5Config
from mpotrain.sample import SampleLengths


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that one micro-batch keeps for its backward pass, and the peak at the loss.

    Attributes:
        blocks: kept by all blocks.
        output: scores of the vocabulary and their fp32 copies while the loss is computed.
    """

    blocks: int
    output: int

    @property
    def total(self) -> int:
        """Bytes at the highest point: everything kept by the blocks plus the output layer."""
        return self.blocks + self.output


@dataclass(frozen=True)
class _Stack:
    """Blocks of one kind.

    Attributes:
        rows: tokens of the micro-batch that they read.
        plain: bytes a token keeps in a block with an ordinary feed-forward layer.
        mixture: bytes it keeps in a block with a mixture.
        depth: blocks.
        num_mixtures: those of them with a mixture.
        boundary: bytes of the residual stream of a token.
    """

    rows: int
    plain: int
    mixture: int
    depth: int
    num_mixtures: int
    boundary: int

    def kept(self, recomputed: bool) -> int:
        """Return the bytes of all blocks; recomputed ones keep their input and one block whole."""
        if recomputed:
            largest = self.mixture if self.num_mixtures else self.plain
            return self.rows * (self.depth * self.boundary + largest)
        plain = self.plain * (self.depth - self.num_mixtures)
        return self.rows * (plain + self.mixture * self.num_mixtures)


def activation_memory(
    model: AnyModel, lengths: SampleLengths, num_samples: int, width: int
) -> ActivationMemory:
    """Return the activation memory of one micro-batch.

    Tensorized and dense sites keep the same tensor, their input; what a plan keeps beside it (a
    rebuilt matrix, the output of a central product) `plan` shows with the site. Experts spread over
    ranks keep rows of other ranks' tokens in place of their own: as many where loads are even.
    Counted are fused kernels, as CUDA has them: attention keeps O(B T H), not O(B T^2), a dropped
    tensor one byte per element. Masks that all blocks read are not counted.

    Args:
        model: sizes.
        lengths: rows of a sample.
        num_samples: sequences of the micro-batch.
        width: bytes of an activation (4 for fp32, 2 for bf16).
    """
    blocks = sum(
        stack.kept(model.activation_checkpointing)
        for stack in _stacks(model, lengths, num_samples, width)
    )
    rows = num_samples * _output_rows(model, lengths)
    features = model.embedding_width if isinstance(model, EncoderConfig) else model.hidden_size
    return ActivationMemory(
        blocks, rows * (model.vocab_size * (width + 8) + features * (width + 4))
    )


def _output_rows(model: AnyModel, lengths: SampleLengths) -> int:
    if isinstance(model, EncoderConfig):
        return lengths.predicted
    return lengths.targets


def _stacks(model: AnyModel, lengths: SampleLengths, num_samples: int, width: int) -> list[_Stack]:
    if isinstance(model, T5Config):
        return _t5_stacks(model, lengths, num_samples, width)
    rows, boundary = num_samples * lengths.inputs, model.hidden_size * width
    if isinstance(model, EncoderConfig):
        kept = _encoder_block(model, width)
        return [_Stack(rows, kept, kept, model.num_layers, 0, boundary)]
    attention, num_mixtures = _gpt2_attention(model, width), len(model.mixture_layers())
    plain = attention + 2 * width * model.ffn_size
    mixture = attention + _mixture(model, width, 2)
    return [_Stack(rows, plain, mixture, model.num_layers, num_mixtures, boundary)]


def _gpt2_attention(model: GPT2Config, width: int) -> int:
    """Return the bytes a token keeps in a block of GPT-2 outside of its feed-forward layer."""
    hidden = model.hidden_size
    # Inputs of the first three matrices (3 H), q k v and the attention result (4 H); both norms
    # keep their fp32 input and two statistics, dropout masks are bytes.
    kept = width * 7 * hidden + 2 * (4 * hidden + 8)
    if width != 4:
        kept += 2 * width * hidden
    if model.dropout > 0:
        kept += 2 * hidden
    return kept


def _encoder_block(model: EncoderConfig, width: int) -> int:
    """Return the bytes a token keeps in a layer of an encoder."""
    hidden = model.hidden_size
    # Inputs of attention and feed-forward layer, q k v, the attention result; both norms keep their
    # fp32 input and two statistics.
    kept = width * (6 * hidden + _inner_rows(model) * model.ffn_size) + 2 * (4 * hidden + 8)
    if model.dropout > 0:
        kept += 2 * hidden
    if model.adapter is not None:
        # Matrix and adapter read the same input; the adapter keeps what lies between U and D too.
        kept += width * model.adapter.rank * len(model.adapter.families)
    return kept


def _inner_rows(model: EncoderConfig) -> int:
    """Return how many tensors of the width F a feed-forward layer keeps.

    A GELU keeps its input; ReLU keeps its result, which is the input of the second matrix.
    """
    return 1 if model.activation == "relu" else 2


def _t5_stacks(
    model: T5Config, lengths: SampleLengths, num_samples: int, width: int
) -> list[_Stack]:
    hidden, inner, ffn = model.hidden_size, model.inner_size, model.ffn_size
    drops = model.dropout > 0
    # Around attention and feed-forward layers alike: the fp32 input of the norm and one statistic,
    # its result, the mask of what is dropped at the end.
    around = 4 * hidden + 4 + width * hidden + drops * hidden
    encoder = 2 * around + width * 4 * inner
    # Cross-attention: queries and result; keys and values of the source.
    decoder = encoder + around + width * 2 * inner
    decoder += width * 2 * inner * lengths.inputs // max(lengths.targets, 1)
    # The result of ReLU; where dropped, that as well, with its mask. Mixtures drop nothing inside.
    plain = width * ffn * (2 if drops else 1) + drops * ffn
    mixture = _mixture(model, width, 1)
    rows = {"encoder": lengths.inputs, "decoder": lengths.targets}
    kept = {"encoder": encoder, "decoder": decoder}
    mixtures = {stack: len(model.mixture_layers(stack)) for stack in ("encoder", "decoder")}
    return [
        _Stack(
            num_samples * rows[stack], kept[stack] + plain, kept[stack] + mixture, depth,
            mixtures[stack], width * hidden,
        )
        for stack, depth in model.stacks.items()
    ]  # fmt: skip


def _mixture(model: GPT2Config | T5Config, width: int, inner_rows: int) -> int:
    """Return the bytes a token keeps in a mixture, its input in the compute dtype not counted.

    Args:
        model: sizes.
        width: bytes of an activation.
        inner_rows: tensors of the width F that a choice keeps between the matrices of an expert.
    """
    if model.moe is None:
        return 0
    router, hidden = model.moe.router, model.hidden_size
    # The rows of all choices, before and after the first matrix of an expert.
    kept = width * router.top_k * (hidden + inner_rows * model.ffn_size)
    if router.gate_at == "output":
        kept += width * router.top_k * hidden  # results, for the gradient of their gates
    if width != 4:
        kept += 4 * hidden  # the router's input in fp32, in place of that of the first matrix
        kept -= width * hidden if router.gate_at == "output" else 0
    if router.jitter > 0:
        kept += 4 * hidden
    # Three fp32 numbers for each expert (scores, logarithms, probabilities); permutations.
    return kept + 12 * model.moe.num_experts + 28 * router.top_k
