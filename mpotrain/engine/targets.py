"""What a global batch is divided by: its targets, and its pairs of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mpotrain.batch import Batch
from mpotrain.parallel.ranks import World


@dataclass(frozen=True)
class Targets:
    """Counts over the whole global batch, all ranks included.

    Attributes:
        num_tokens: targets that count in the loss.
        num_pairs: pairs of segments with a label.
    """

    num_tokens: int
    num_pairs: int

    def weigh(self, batch: Batch) -> Batch:
        """Return a micro-batch that knows what its pairs count; itself where it has none.

        The engine divides the whole objective by the number of targets. With this weight the
        losses of pairs are divided by the number of pairs, however batches are cut.
        """
        if batch.pair_labels is None:
            return batch
        weight = torch.tensor(self.num_tokens / max(self.num_pairs, 1), dtype=torch.float32)
        return replace(batch, pair_weight=weight)


def count_targets(microbatches: Sequence[Batch], world: World) -> Targets:
    """Count the targets of a step (collective).

    Args:
        microbatches: this rank's part of the global batch.
        world: the ranks.
    """
    counts = [sum(b.num_tokens for b in microbatches), sum(b.num_pairs for b in microbatches)]
    total = world.all_reduce_sum(torch.tensor(counts, dtype=torch.int64, device=world.device))
    return Targets(*map(int, total.tolist()))
