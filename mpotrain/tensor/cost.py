"""What the operations of a contraction cost: FLOPs, bytes, time (torch-free).

The time of one operation is ``max(FLOPs / (peak * efficiency), bytes / bandwidth) + launch``;
copies that reorder axes count as operations of their own. Cores are merged, and gradients are
projected on cores, in fp32; everything with a token dimension is done in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mpotrain.tensor.device import BYTES, DeviceProfile, DType
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.tree import Merge, Range, merge_order, merge_shape

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Operation:
    """One matrix product or one reordering copy.

    Attributes:
        phase: whether forward or backward executes it.
        name: what it computes.
        shape: "batch x m x k x n" of a product, or the elements of a copy.
        flops: multiplications and additions.
        bytes: bytes read and written.
        seconds: predicted time.
    """

    phase: Phase
    name: str
    shape: str
    flops: int
    bytes: int
    seconds: float


def operations_table(
    operations: Iterable[Operation], flops: float, num_bytes: float, seconds: float
) -> str:
    """Return operations as a table with their FLOPs, bytes and time, and a line of totals.

    Args:
        operations: in order of execution; repeated ones may stand once.
        flops: of the whole plan.
        num_bytes: of the whole plan.
        seconds: of the whole plan.
    """
    rows = [("phase", "operation", "m x k x n", "MFLOP", "MB", "us")]
    rows += [
        (
            operation.phase,
            operation.name,
            operation.shape,
            f"{operation.flops / 1e6:.1f}",
            f"{operation.bytes / 1e6:.1f}",
            f"{operation.seconds * 1e6:.1f}",
        )
        for operation in operations
    ]
    total = f"{flops / 1e6:.1f}", f"{num_bytes / 1e6:.1f}", f"{seconds * 1e6:.1f}"
    rows.append(("total", "", "", *total))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class DenseCost:
    """Forward and backward of a dense layer of the same size.

    Attributes:
        forward_flops: FLOPs of y = x W.
        backward_flops: FLOPs of dx and dW.
        bytes: bytes read and written.
        seconds: predicted time of forward and backward.
    """

    forward_flops: int
    backward_flops: int
    bytes: int
    seconds: float


def gemm(
    phase: Phase,
    name: str,
    m: int,
    n: int,
    k: int,
    *,
    dtype: DType,
    profile: DeviceProfile,
    batch: int = 1,
) -> Operation:
    """Return the cost of one m x k matrix times `batch` matrices of k x n."""
    flops = 2 * batch * m * n * k
    num_bytes = BYTES[dtype] * (m * k + batch * (k * n + m * n))
    efficiency = profile.efficiency(m, n, k)
    if batch > 1:
        efficiency *= profile.batched_efficiency(n)
    compute = flops / (profile.flops(dtype) * efficiency)
    seconds = max(compute, profile.move_seconds(num_bytes)) + profile.launch_seconds
    shape = f"{m} x {k} x {n}" if batch == 1 else f"{batch} x ({m} x {k} x {n})"
    return Operation(phase, name, shape, flops, num_bytes, seconds)


def copy(
    phase: Phase, name: str, size: int, read: DType, write: DType, profile: DeviceProfile
) -> Operation:
    """Return the cost of copying `size` elements in another order of axes or another dtype."""
    num_bytes = size * (BYTES[read] + BYTES[write])
    seconds = profile.permute_seconds(num_bytes) + profile.launch_seconds
    return Operation(phase, name, f"{size} elements", 0, num_bytes, seconds)


def dense_cost(
    in_features: int, out_features: int, tokens: int, dtype: DType, profile: DeviceProfile
) -> DenseCost:
    """Return the cost of forward and backward of ``torch.nn.Linear``.

    Args:
        in_features: rows of W.
        out_features: columns of W.
        tokens: rows of x.
        dtype: dtype of x and W.
        profile: the device.
    """
    sizes = (tokens, out_features, in_features)
    operations = _dense_operations(sizes, dtype, profile)
    forward = operations[0]
    return DenseCost(
        forward_flops=forward.flops,
        backward_flops=sum(operation.flops for operation in operations[1:]),
        bytes=sum(operation.bytes for operation in operations),
        seconds=sum(operation.seconds for operation in operations),
    )


def _dense_operations(
    sizes: tuple[int, int, int], dtype: DType, profile: DeviceProfile
) -> tuple[Operation, Operation, Operation]:
    tokens, out_features, in_features = sizes
    return (
        gemm("forward", "y = x W", tokens, out_features, in_features, dtype=dtype, profile=profile),
        gemm(
            "backward", "dW = x^T dy", in_features, out_features, tokens,
            dtype=dtype, profile=profile,
        ),
        gemm(
            "backward", "dx = dy W^T", tokens, in_features, out_features,
            dtype=dtype, profile=profile,
        ),
    )  # fmt: skip


def materialise_operations(
    spec: MPOSpec, tokens: int, dtype: DType, profile: DeviceProfile, keep_weight: bool
) -> tuple[Operation, ...]:
    """Return the operations of rebuilding W and multiplying by it, in order of execution."""
    merges = merge_order(spec, 0, spec.num_cores - 1)
    padded = spec.padded_in * spec.padded_out
    y, dw, dx = _dense_operations((tokens, spec.out_features, spec.in_features), dtype, profile)
    interleave = copy("backward", "reorder dW", padded, dtype, "fp32", profile)
    rebuild_last: list[Operation] = []
    if not keep_weight:
        rebuild_last = [
            *merge_operations("backward", spec, merges[-1:], profile),
            copy("backward", "reorder W", padded, "fp32", dtype, profile),
        ]
    return (
        *merge_operations("forward", spec, merges, profile),
        copy("forward", "reorder W", padded, "fp32", dtype, profile),
        y,
        dw,
        interleave,
        *merge_operations("backward", spec, merges[:-1], profile),
        *project_operations(spec, merges, profile),
        *rebuild_last,
        dx,
    )


def merge_operations(
    phase: Phase, spec: MPOSpec, merges: Iterable[Merge], profile: DeviceProfile
) -> Iterator[Operation]:
    """Yield the operations of multiplying cores together."""
    for merge in merges:
        m, n, k = merge_shape(spec, merge)
        name = f"merge {range_name(merge.left)} with {range_name(merge.right)}"
        yield gemm(phase, name, m, n, k, dtype="fp32", profile=profile)


def project_operations(
    spec: MPOSpec, merges: Iterable[Merge], profile: DeviceProfile
) -> Iterator[Operation]:
    """Yield the operations of the gradient of merges: two products for each of them."""
    for merge in reversed(tuple(merges)):
        m, n, k = merge_shape(spec, merge)
        for part, sizes in ((merge.left, (m, k, n)), (merge.right, (k, n, m))):
            name = f"gradient of {range_name(part)}"
            yield gemm("backward", name, *sizes, dtype="fp32", profile=profile)


def range_name(cores: Range) -> str:
    """Return how plans call a range of cores, counted from 1."""
    first, last = cores[0] + 1, cores[1] + 1
    return f"core {first}" if first == last else f"cores {first}-{last}"
