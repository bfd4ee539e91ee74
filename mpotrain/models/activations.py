"""Memory of activations of GPT-2, predicted from its sizes (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.models.config import GPT2Config


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


def activation_memory(
    model: GPT2Config, num_tokens: int, sequence_length: int, width: int
) -> ActivationMemory:
    """Return the activation memory of one micro-batch.

    Tensorized and dense sites keep the same tensor, their input; what a plan keeps beside it (a
    rebuilt matrix, the output of a central product) `plan` shows with the site. Experts spread over
    ranks keep rows of other ranks' tokens in place of their own: as many where loads are even.

    Args:
        model: sizes.
        num_tokens: tokens B T of the micro-batch.
        sequence_length: T.
        width: bytes of an activation (4 for fp32, 2 for bf16).
    """
    del sequence_length  # fused attention keeps O(B T H), not O(B T^2)
    hidden, ffn = model.hidden_size, model.ffn_size
    # Inputs of the four matrices (3 H + F), q k v and the attention result (4 H), the input of
    # GELU (F); both norms keep their fp32 input and two statistics, dropout masks are bytes.
    kept = width * (7 * hidden + 2 * ffn) + 2 * (4 * hidden + 8)
    if width != 4:
        kept += 2 * width * hidden
    if model.dropout > 0:
        kept += 2 * hidden
    mixture = kept + _mixture_extra(model, width)
    num_mixtures = len(model.mixture_layers())
    blocks = num_tokens * (kept * (model.num_layers - num_mixtures) + mixture * num_mixtures)
    if model.activation_checkpointing:
        largest = mixture if num_mixtures else kept
        blocks = num_tokens * (model.num_layers * hidden * width + largest)
    output = num_tokens * model.vocab_size * (width + 8) + num_tokens * hidden * (width + 4)
    return ActivationMemory(blocks, output)


def _mixture_extra(model: GPT2Config, width: int) -> int:
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
