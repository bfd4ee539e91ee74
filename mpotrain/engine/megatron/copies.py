"""How layers are cut into chunks, and which tensors then exist more than once.

A tensor that several layers use is held by every chunk that has one of those layers; the matrix of
tokens is held by the chunk that embeds and by the chunk that predicts. The gradient of such a
tensor is the sum over all its copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable


def names_of_several(holders: Iterable[Collection[str]]) -> frozenset[str]:
    """Return the names that more than one holder has.

    Args:
        holders: names of the tensors that each layer uses (then those that layers share are
            returned), or that each chunk of the pipeline holds (then those that have copies).
    """
    counts = Counter(name for names in holders for name in set(names))
    return frozenset(name for name, count in counts.items() if count > 1)


def chunk_layers(num_layers: int, stages: int, virtual: int = 1) -> dict[tuple[int, int], range]:
    """Return the layers of every chunk, in the order in which a micro-batch meets them.

    A micro-batch passes the first chunks of all stages, then the second ones, and so on, as in
    Megatron-core's interleaved schedule.

    Args:
        num_layers: layers of the network; a multiple of stages x virtual.
        stages: stages of the pipeline.
        virtual: chunks of each stage.

    Returns:
        Layers by (stage, virtual stage).
    """
    size = num_layers // (stages * virtual)
    order = [(stage, chunk) for chunk in range(virtual) for stage in range(stages)]
    return {place: range(n * size, (n + 1) * size) for n, place in enumerate(order)}
