"""Memory of activations, predicted from the sizes of a network (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, fields

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
class TokenMemory:
    """Bytes that one token keeps in one block, by what an engine that cuts networks does to them.

    Attributes:
        stream: of the residual stream: norms, dropped sums, routers.
        inputs: what the matrices in front of heads and inner features read.
        inner: between these matrices and those behind heads and inner features.
        keys: keys and values of self-attention.
        rows: inputs of the experts, one for each choice.
        whole: between the two factors of adapters.
    """

    stream: int = 0
    inputs: int = 0
    inner: int = 0
    keys: int = 0
    rows: int = 0
    whole: int = 0

    @property
    def total(self) -> int:
        """All bytes where nothing is cut."""
        return sum(getattr(self, key.name) for key in fields(self))

    def plus(self, other: TokenMemory) -> TokenMemory:
        """Return the sum of both, field by field."""
        return TokenMemory(
            **{key.name: getattr(self, key.name) + getattr(other, key.name) for key in fields(self)}
        )


@dataclass(frozen=True)
class BlockStack:
    """Blocks of one kind.

    Attributes:
        rows: tokens of the micro-batch that they read.
        plain: what a token keeps in a block with an ordinary feed-forward layer.
        mixture: what it keeps in a block with a mixture.
        depth: blocks.
        mixture_layers: numbers of those of them with a mixture.
        boundary: bytes of the residual stream of a token.
    """

    rows: int
    plain: TokenMemory
    mixture: TokenMemory
    depth: int
    mixture_layers: tuple[int, ...]
    boundary: int

    def kept(self, recomputed: bool) -> int:
        """Return the bytes of all blocks; recomputed ones keep their input and one block whole."""
        num_mixtures = len(self.mixture_layers)
        if recomputed:
            largest = self.mixture if num_mixtures else self.plain
            return self.rows * (self.depth * self.boundary + largest.total)
        plain = self.plain.total * (self.depth - num_mixtures)
        return self.rows * (plain + self.mixture.total * num_mixtures)


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
        for stack in block_stacks(model, lengths, num_samples, width)
    )
    rows = num_samples * output_rows(model, lengths)
    features = model.embedding_width if isinstance(model, EncoderConfig) else model.hidden_size
    return ActivationMemory(
        blocks, rows * (model.vocab_size * (width + 8) + features * (width + 4))
    )


def output_rows(model: AnyModel, lengths: SampleLengths) -> int:
    """Return the rows of a sample whose tokens are predicted."""
    if isinstance(model, EncoderConfig):
        return lengths.predicted
    return lengths.targets


def block_stacks(
    model: AnyModel, lengths: SampleLengths, num_samples: int, width: int
) -> list[BlockStack]:
    """Return what the blocks of a network keep of a micro-batch; arguments as of the sum of it."""
    if isinstance(model, T5Config):
        return _t5_stacks(model, lengths, num_samples, width)
    rows, boundary = num_samples * lengths.inputs, model.hidden_size * width
    if isinstance(model, EncoderConfig):
        kept = _encoder_block(model, width)
        return [BlockStack(rows, kept, kept, model.num_layers, (), boundary)]
    attention, hidden = _gpt2_attention(model, width), width * model.hidden_size
    # Behind the norm a feed-forward layer reads what a router reads.
    plain = TokenMemory(inputs=hidden, inner=2 * width * model.ffn_size)
    mixture = TokenMemory(stream=hidden).plus(_mixture(model, width, 2))
    layers = tuple(model.mixture_layers())
    return [
        BlockStack(
            rows, attention.plus(plain), attention.plus(mixture), model.num_layers, layers, boundary
        )
    ]


def _gpt2_attention(model: GPT2Config, width: int) -> TokenMemory:
    """Return what a token keeps in a block of GPT-2 outside of its feed-forward layer."""
    hidden = model.hidden_size
    # Both norms keep their fp32 input and two statistics, dropout masks are bytes.
    stream = 2 * (4 * hidden + 8)
    if width != 4:
        stream += 2 * width * hidden
    if model.dropout > 0:
        stream += 2 * hidden
    # The input of the first matrix; q k v, the result of attention, the input of the second one.
    return TokenMemory(
        stream=stream,
        inputs=width * hidden,
        inner=width * 3 * hidden,
        keys=width * 2 * hidden,
    )


def _encoder_block(model: EncoderConfig, width: int) -> TokenMemory:
    """Return what a token keeps in a layer of an encoder."""
    hidden = model.hidden_size
    # Both norms keep their fp32 input and two statistics.
    stream = 2 * (4 * hidden + 8) + (2 * hidden if model.dropout > 0 else 0)
    # Matrix and adapter read the same input; the adapter keeps what lies between U and D too.
    adapters = 0
    if model.adapter is not None:
        adapters = width * model.adapter.rank * len(model.adapter.families)
    return TokenMemory(
        stream=stream,
        inputs=width * 2 * hidden,
        inner=width * (2 * hidden + _inner_rows(model) * model.ffn_size),
        keys=width * 2 * hidden,
        whole=adapters,
    )


def _inner_rows(model: EncoderConfig) -> int:
    """Return how many tensors of the width F a feed-forward layer keeps.

    A GELU keeps its input; ReLU keeps its result, which is the input of the second matrix.
    """
    return 1 if model.activation == "relu" else 2


def _t5_stacks(
    model: T5Config, lengths: SampleLengths, num_samples: int, width: int
) -> list[BlockStack]:
    hidden, inner, ffn = model.hidden_size, model.inner_size, model.ffn_size
    drops = model.dropout > 0
    # Around attention and feed-forward layers alike: the fp32 input of the norm and one statistic,
    # the mask of what is dropped at the end; and the result of the norm.
    around = TokenMemory(stream=4 * hidden + 4 + drops * hidden, inputs=width * hidden)
    attention = around.plus(TokenMemory(inner=width * 2 * inner, keys=width * 2 * inner))
    # Cross-attention: queries and result; keys and values of the source.
    source = width * 2 * inner * lengths.inputs // max(lengths.targets, 1)
    cross = around.plus(TokenMemory(inner=width * 2 * inner + source))
    # The result of ReLU; where dropped, that as well, with its mask. Mixtures drop nothing inside.
    plain = around.plus(TokenMemory(inner=width * ffn * (2 if drops else 1) + drops * ffn))
    mixture = TokenMemory(stream=around.stream + around.inputs).plus(_mixture(model, width, 1))
    rows = {"encoder": lengths.inputs, "decoder": lengths.targets}
    mixtures = {stack: model.mixture_layers(stack) for stack in ("encoder", "decoder")}
    kept = {"encoder": attention, "decoder": attention.plus(cross)}
    return [
        BlockStack(
            num_samples * rows[stack], kept[stack].plus(plain), kept[stack].plus(mixture), depth,
            tuple(mixtures[stack]), width * hidden,
        )
        for stack, depth in model.stacks.items()
    ]  # fmt: skip


def _mixture(model: GPT2Config | T5Config, width: int, inner_rows: int) -> TokenMemory:
    """Return what a token keeps in a mixture, its input in the compute dtype not counted.

    Args:
        model: sizes.
        width: bytes of an activation.
        inner_rows: tensors of the width F that a choice keeps between the matrices of an expert.
    """
    if model.moe is None:
        return TokenMemory()
    router, hidden = model.moe.router, model.hidden_size
    # Three fp32 numbers for each expert (scores, logarithms, probabilities); permutations.
    stream = 12 * model.moe.num_experts + 28 * router.top_k
    if router.gate_at == "output":
        stream += width * router.top_k * hidden  # results, for the gradient of their gates
    if width != 4:
        stream += 4 * hidden  # the router's input in fp32, in place of that of the first matrix
        stream -= width * hidden if router.gate_at == "output" else 0
    if router.jitter > 0:
        stream += 4 * hidden
    # The rows of all choices, before and after the first matrix of an expert.
    return TokenMemory(
        stream=stream,
        inner=width * router.top_k * inner_rows * model.ffn_size,
        rows=width * router.top_k * hidden,
    )
