"""How experts with a shared central tensor are computed: rebuilt or factored (torch-free).

`plan_experts` takes shapes and a device profile and returns a printable `ExpertPlan`, which
`mpotrain.tensor.expert_linear.expert_linear` executes. The candidates are

* grouped: rebuild the matrices W_e of a few experts at a time and multiply their rows by them;
* factored: multiply the rows of each expert by its left auxiliaries, all rows at once by the
  central tensor, and the rows of each expert by its right auxiliaries. No W_e is ever formed.

The factored form costs d2/(j3 jR) + d2 d3/(iL jR) + d3/(iL i3) of the FLOPs of a dense layer,
whatever the number of experts; the grouped form those of a dense layer plus one rebuild for each
expert. Neither keeps a rebuilt expert for backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from mpotrain.errors import SpecError
from mpotrain.tensor.cost import Operation, dense_cost, operations_table
from mpotrain.tensor.device import BYTES, DeviceProfile, DType
from mpotrain.tensor.expert_cost import (
    ExpertLoad,
    MergeSide,
    factored_operations,
    factored_saved_bytes,
    factored_transient_bytes,
    grouped_operations,
    grouped_transient_bytes,
    state_sizes,
)
from mpotrain.tensor.experts import ExpertShape
from mpotrain.tensor.spec import MPOSpec

__all__ = ["ExpertKind", "ExpertPlan", "MergePrecision", "MergeSide", "plan_experts"]

ExpertKind = Literal["grouped", "factored"]
MergePrecision = Literal["fp32", "compute"]
"""Precision of the partial products of cores: fp32 at least, or that of x."""

_MOST_CHUNK_BYTES = 256 << 20
"""Rebuilt experts that may be alive together; keeps the transient memory near a dense layer's."""

_MOST_STATE_WIDTH = 4
"""Factored plans whose states are more times wider than x and y together are not considered."""


@dataclass(frozen=True)
class ExpertPlan:
    """One way of computing y = x W_e for rows sorted by expert, with its predicted cost.

    Attributes:
        spec: the operator of one expert.
        num_experts: experts of this process, E.
        tokens: rows over all experts for which the cost was predicted, spread evenly; the plan is
            valid for any number and any spread.
        dtype: dtype of x and y.
        profile: name of the device profile.
        kind: grouped or factored.
        first: auxiliaries that meet the central tensor first when experts are rebuilt.
        chunk: experts that are rebuilt together (grouped; 1 for factored).
        keep_state: whether forward keeps the output of the central product (factored only).
        merge_precision: precision of rebuilding and of projecting gradients on cores.
        forward_flops: FLOPs of the matrix products of forward.
        backward_flops: FLOPs of backward when every gradient is wanted.
        bytes: bytes read and written in forward and backward.
        seconds: predicted time of forward and backward.
        dense_seconds: predicted time of one dense layer over the same rows.
        saved_bytes: bytes kept for backward beside x and the cores.
        transient_bytes: peak of short-lived bytes beside x, y, their gradients and the cores.
        ratio: `seconds` over `dense_seconds`.
        flops_ratio: FLOPs over the FLOPs of that dense layer.
        operations: the single operations, in order of execution; repeated ones stand once.
    """

    spec: MPOSpec
    num_experts: int
    tokens: int
    dtype: DType
    profile: str
    kind: ExpertKind
    first: MergeSide
    chunk: int
    keep_state: bool
    merge_precision: MergePrecision
    forward_flops: int
    backward_flops: int
    bytes: int
    seconds: float
    dense_seconds: float
    saved_bytes: int
    transient_bytes: int
    ratio: float
    flops_ratio: float
    operations: tuple[Operation, ...] = field(repr=False, compare=False)

    @property
    def shape(self) -> ExpertShape:
        """Merged sizes of one expert's operator."""
        return ExpertShape.of(self.spec)

    @property
    def summary(self) -> str:
        """The plan in one line."""
        how: str = self.kind
        if self.kind == "grouped":
            how += f", {self.first} auxiliaries first, {self.chunk} rebuilt at a time"
            if self.merge_precision == "compute" and self.dtype != "fp32":
                how += f", merged in {self.dtype}"
        elif self.keep_state:
            how += ", output of the central product kept"
        return (
            f"{self.num_experts} experts {self.spec.in_features} x {self.spec.out_features}, "
            f"{self.tokens} rows, {self.dtype} on {self.profile}: {how}; "
            f"{self.ratio:.2f} x dense time, {self.flops_ratio:.2f} x dense FLOPs, "
            f"saves {self.saved_bytes / 2**20:.1f} MiB, "
            f"transient {self.transient_bytes / 2**20:.1f} MiB"
        )

    def describe(self) -> str:
        """Return the plan as a table of operations with FLOPs, bytes and time."""
        flops = self.forward_flops + self.backward_flops
        table = operations_table(self.operations, flops, self.bytes, self.seconds)
        return f"{self.summary}\n{table}"


@lru_cache(maxsize=4096)
def plan_experts(
    spec: MPOSpec,
    num_experts: int,
    tokens: int,
    dtype: DType,
    profile: DeviceProfile,
    force: ExpertKind | None = None,
    *,
    keep_state: bool = True,
    merge_precision: MergePrecision = "fp32",
) -> ExpertPlan:
    """Return the plan with the least predicted time of forward and backward.

    The plan depends on shapes alone, never on the routing, so that a run's arithmetic does not
    follow its data: `tokens` are the rows that are nominally expected. A factored plan whose states
    would need many times the memory of x and y is taken only where it is forced.

    Args:
        spec: the operator of one expert, at least 3 cores, not padded.
        num_experts: experts of this process.
        tokens: rows over all these experts (top_k times the tokens of the micro-batch when all
            experts are here).
        dtype: dtype of x.
        profile: constants of the device.
        force: take the best plan of this kind.
        keep_state: let a factored plan keep the output of the central product for backward
            (`saved_bytes`) instead of computing it again.
        merge_precision: "fp32" merges cores and projects gradients in fp32 at least; "compute" does
            so in the dtype of x, as released implementations do: faster where 16-bit products are,
            with about twice the rounding error.

    Raises:
        SpecError: the operator cannot be that of experts, or an argument is unknown.
    """
    if dtype not in BYTES:
        raise SpecError(f"dtype is {dtype!r}; plans know {', '.join(sorted(BYTES))}")
    if force not in (None, "grouped", "factored"):
        raise SpecError(f"expert plan {force!r} is unknown; use 'grouped' or 'factored'")
    if num_experts < 1:
        raise SpecError(f"num_experts is {num_experts}; it must be at least 1")
    merge_dtype: DType = dtype if merge_precision == "compute" else "fp32"
    load = ExpertLoad(
        spec, ExpertShape.of(spec), num_experts, max(tokens, 1), dtype, merge_dtype, profile
    )
    candidates = []
    if force != "factored":
        candidates += [
            _plan(load, "grouped", first, chunk, False, merge_precision)
            for first in _SIDES
            for chunk in _chunks(load)
        ]
    wide = sum(state_sizes(load.shape)) > _MOST_STATE_WIDTH * (spec.in_features + spec.out_features)
    if force == "factored" or (force is None and not wide):
        candidates.append(_plan(load, "factored", "left", 1, keep_state, merge_precision))
    return min(candidates, key=lambda plan: plan.seconds)


_SIDES: tuple[MergeSide, ...] = ("left", "right")


def _chunks(load: ExpertLoad) -> list[int]:
    """Return the numbers of experts to rebuild together that are worth comparing."""
    each = load.spec.dense_parameters * (BYTES[load.dtype] + BYTES[load.merge_dtype])
    most = min(load.active, max(1, _MOST_CHUNK_BYTES // each))
    chunks = [1]
    while 2 * chunks[-1] <= most:
        chunks.append(2 * chunks[-1])
    if chunks[-1] != most:
        chunks.append(most)
    return chunks


def _plan(
    load: ExpertLoad,
    kind: ExpertKind,
    first: MergeSide,
    chunk: int,
    keep_state: bool,
    merge_precision: MergePrecision,
) -> ExpertPlan:
    spec = load.spec
    if kind == "grouped":
        operations = grouped_operations(load, first, chunk)
        saved, transient = 0, grouped_transient_bytes(load, first, chunk)
    else:
        operations = factored_operations(load, keep_state)
        saved = factored_saved_bytes(load) if keep_state else 0
        transient = factored_transient_bytes(load)
    dense = dense_cost(spec.in_features, spec.out_features, load.tokens, load.dtype, load.profile)
    forward = sum(op.flops for op in operations if op.phase == "forward")
    backward = sum(op.flops for op in operations if op.phase == "backward")
    seconds = sum(op.seconds for op in operations)
    return ExpertPlan(
        spec=spec,
        num_experts=load.num_experts,
        tokens=load.tokens,
        dtype=load.dtype,
        profile=load.profile.name,
        kind=kind,
        first=first,
        chunk=chunk,
        keep_state=keep_state,
        merge_precision=merge_precision,
        forward_flops=forward,
        backward_flops=backward,
        bytes=sum(op.bytes for op in operations),
        seconds=seconds,
        dense_seconds=dense.seconds,
        saved_bytes=saved,
        transient_bytes=transient,
        ratio=seconds / dense.seconds,
        flops_ratio=(forward + backward) / (dense.forward_flops + dense.backward_flops),
        operations=operations,
    )
