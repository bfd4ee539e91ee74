"""Relative positions of T5: a learned term of attention scores for each bucket of distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def distance_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """Return the bucket of a distance in one direction (Raffel et al. 2020, section 2.1).

    The first half of the buckets hold one distance each; the other half grow in geometric steps up
    to `max_distance`, from which on all distances share the last bucket. With e single distances
    and m further buckets, distance d belongs to bucket e + floor(m log(d / e) / log(max / e)).
    Powers of integers are compared in place of logarithms: a rounded logarithm puts a distance at
    the edge of a bucket now here, now there, by the device that computes it.

    Args:
        distance: at least 0.
        num_buckets: buckets of this direction, at least 2.
        max_distance: above half of `num_buckets`.
    """
    single = num_buckets // 2
    if distance < single:
        return distance
    further = num_buckets - single
    reached = int(distance**further)
    edges = (int(max_distance**k * single ** (further - k)) for k in range(1, further))
    return single + sum(edge <= reached for edge in edges)


def bucket_table(num_buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Return the bucket of every relative position, int64 (2 max_distance + 1,).

    Args:
        num_buckets: all buckets; with both directions each has half of them.
        max_distance: distance from which on all share the last bucket.
        bidirectional: whether keys behind the query have buckets of their own, as in an encoder;
            otherwise all of them share bucket 0 and are meant to be masked.

    Returns:
        Entry r + max_distance belongs to keys at r = (position of key) - (position of query).
    """
    per_direction = num_buckets // 2 if bidirectional else num_buckets
    away = [distance_bucket(d, per_direction, max_distance) for d in range(max_distance + 1)]
    ahead = [per_direction + bucket if bidirectional else 0 for bucket in away[1:]]
    return torch.tensor([*reversed(away), *ahead])


class RelativeBias(nn.Module):
    """What attention scores gain from the distance of query and key, for each head.

    Attributes:
        weight: parameter (buckets, heads).
        table: bucket of each relative position, see `bucket_table`; it follows from the sizes and
            is no part of the training state.
    """

    table: Tensor

    def __init__(
        self,
        num_buckets: int,
        max_distance: int,
        num_heads: int,
        *,
        bidirectional: bool,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the terms from a normal distribution.

        Args:
            num_buckets: buckets of distances.
            max_distance: distance from which on all share the last bucket.
            num_heads: attention heads.
            bidirectional: whether both directions have buckets of their own.
            std: standard deviation at start.
            generator: of the start values.
        """
        super().__init__()
        self.max_distance = max_distance
        weight = torch.empty(num_buckets, num_heads)
        self.weight = nn.Parameter(weight.normal_(0.0, std, generator=generator))
        table = bucket_table(num_buckets, max_distance, bidirectional=bidirectional)
        self.register_buffer("table", table, persistent=False)

    def forward(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return the terms of all pairs of positions of a sequence.

        Args:
            length: positions T.
            dtype: of the scores. The terms are spread, and their gradients summed, in the dtype of
                the parameter.

        Returns:
            (1, heads, T, T): queries by keys.
        """
        # The term depends on the difference alone: look up 2 T - 1 of them, in ascending order.
        positions = torch.arange(1 - length, length, device=self.table.device)
        clamped = positions.clamp(-self.max_distance, self.max_distance) + self.max_distance
        values = functional.embedding(self.table[clamped], self.weight.float()).T
        # Window i holds the differences from i + 1 - T on, which are those of query T - 1 - i.
        return values.unfold(1, length, 1).flip(1)[None].to(dtype)
