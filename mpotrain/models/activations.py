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
    Fused attention keeps O(B T H), not O(B T^2).

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
    hidden, boundary = model.hidden_size, model.hidden_size * width
    if isinstance(model, T5Config):
        encoder = _kept(model, width, model.inner_size)
        # Cross-attention: its normalised input, queries, result; keys and values of the source.
        cross = width * (hidden + 3 * model.inner_size) + 4 * hidden + 8
        cross += width * 2 * model.inner_size * lengths.inputs // max(lengths.targets, 1)
        extra = _mixture_extra(model, width)
        rows = {"encoder": lengths.inputs, "decoder": lengths.targets}
        kept = {"encoder": encoder, "decoder": encoder + cross}
        mixtures = {stack: len(model.mixture_layers(stack)) for stack in ("encoder", "decoder")}
        return [
            _Stack(
                num_samples * rows[stack], kept[stack], kept[stack] + extra, depth,
                mixtures[stack], boundary,
            )
            for stack, depth in model.stacks.items()
        ]  # fmt: skip
    kept_bytes, num_mixtures = _kept(model, width, hidden), 0
    if isinstance(model, GPT2Config):
        num_mixtures = len(model.mixture_layers())
    mixture = kept_bytes + (_mixture_extra(model, width) if num_mixtures else 0)
    rows_read = num_samples * lengths.inputs
    return [_Stack(rows_read, kept_bytes, mixture, model.num_layers, num_mixtures, boundary)]


def _kept(model: AnyModel, width: int, inner: int) -> int:
    """Return the bytes a token keeps in a block with self-attention over `inner` features."""
    hidden, ffn = model.hidden_size, model.ffn_size
    # Inputs of the matrices (2 H + inner + F), q k v and the attention result (4 inner), the
    # input of the activation (F); both norms keep their fp32 input and two statistics, dropout
    # masks are bytes.
    kept = width * (2 * hidden + 5 * inner + 2 * ffn) + 2 * (4 * hidden + 8)
    if width != 4:
        kept += 2 * width * hidden
    if model.dropout > 0:
        kept += 2 * hidden
    return kept


def _mixture_extra(model: AnyModel, width: int) -> int:
    """Return the bytes a token keeps in a mixture beyond those in a feed-forward layer."""
    if model.moe is None:
        return 0
    router, hidden = model.moe.router, model.hidden_size
    # The rows of all choices, before and after the first matrix of an expert.
    extra = width * (router.top_k * hidden + 2 * (router.top_k - 1) * model.ffn_size)
    if router.gate_at == "output":
        extra += width * router.top_k * hidden  # results, for the gradient of their gates
    if width != 4:
        extra += 4 * hidden  # the router's input in fp32, in place of that of the first matrix
        extra -= width * hidden if router.gate_at == "output" else 0
    if router.jitter > 0:
        extra += 4 * hidden
    # Three fp32 numbers for each expert (scores, logarithms, probabilities); permutations.
    return extra + 12 * model.moe.num_experts + 28 * router.top_k
