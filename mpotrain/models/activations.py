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

    Tensorized and dense sites keep the same tensor, their input; a plan with `keep_weight` adds
    the rebuilt matrix, which `plan` shows with the site.

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
    block = num_tokens * kept
    blocks = block * model.num_layers
    if model.activation_checkpointing:
        blocks = model.num_layers * num_tokens * hidden * width + block
    output = num_tokens * model.vocab_size * (width + 8) + num_tokens * hidden * (width + 4)
    return ActivationMemory(blocks, output)
