"""Operations of experts with a shared central tensor, and the memory they need (torch-free).

Letters are those of `mpotrain.tensor.experts`: W_e[iL i3 iR, jL j3 jR] = L_e C R_e. Rows are taken
to be spread evenly over the experts. What is done for one expert after the other stands as one
operation with the shape "n x (m x k x n)".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from mpotrain.tensor.cost import Operation, Phase, copy, gemm, range_name
from mpotrain.tensor.device import BYTES, DeviceProfile, DType
from mpotrain.tensor.experts import ExpertShape
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.tree import Merge, merge_order, merge_shape

MergeSide = Literal["left", "right"]
"""The auxiliaries that meet the central tensor first."""

_OTHER: dict[MergeSide, MergeSide] = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class ExpertLoad:
    """What is to be computed.

    Attributes:
        spec: the operator of one expert.
        shape: its merged sizes.
        num_experts: experts, E.
        tokens: rows over all experts.
        dtype: dtype of everything with a row dimension.
        merge_dtype: dtype of partial products of cores and of gradients on the way to cores.
        profile: the device.
    """

    spec: MPOSpec
    shape: ExpertShape
    num_experts: int
    tokens: int
    dtype: DType
    merge_dtype: DType
    profile: DeviceProfile

    @property
    def active(self) -> int:
        """Experts that have rows."""
        return min(self.num_experts, self.tokens)

    @property
    def rows(self) -> int:
        """Rows of one expert."""
        return ceil(self.tokens / self.active)

    @property
    def side_merges(self) -> tuple[tuple[Merge, ...], tuple[Merge, ...]]:
        """Products of neighbouring auxiliaries on the left and on the right side."""
        c, last = self.spec.central_index, self.spec.num_cores - 1
        return merge_order(self.spec, 0, c - 1), merge_order(self.spec, c + 1, last)

    @property
    def half_size(self) -> dict[MergeSide, int]:
        """Elements of C merged with the left, or with the right, auxiliaries of one expert."""
        s = self.shape
        middle = s.central_in * s.central_out
        return {
            "left": s.left_in * s.left_out * middle * s.right_bond,
            "right": s.left_bond * middle * s.right_in * s.right_out,
        }

    def product(self, phase: Phase, name: str, m: int, n: int, k: int) -> Operation:
        """Return one product of rows in the compute dtype."""
        return gemm(phase, name, m, n, k, dtype=self.dtype, profile=self.profile)

    def each(self, phase: Phase, name: str, m: int, n: int, k: int) -> Operation:
        """Return a product of the rows of every active expert with a matrix of its own.

        On GPUs these are one grouped kernel in bf16, else one call for each expert.
        """
        calls = 1 if self.profile.name != "cpu" and self.dtype == "bf16" else self.active
        one = self.product(phase, name, m, n, k)
        return self._together(one, self.active, calls, self.dtype, (m, n, k))

    def merged(
        self, phase: Phase, name: str, m: int, n: int, k: int, count: int, calls: int
    ) -> Operation:
        """Return `count` products of cores in `calls` calls."""
        one = gemm(phase, name, m, n, k, dtype=self.merge_dtype, profile=self.profile)
        return self._together(one, count, calls, self.merge_dtype, (m, n, k))

    def _together(
        self, one: Operation, count: int, calls: int, dtype: DType, sizes: tuple[int, int, int]
    ) -> Operation:
        """Return `count` equal products in `calls` calls; a call may outgrow the cache."""
        if count == 1:
            return one
        share, profile = count / calls, self.profile
        compute = share * one.flops / (profile.flops(dtype) * profile.efficiency(*sizes))
        call = max(compute, profile.move_seconds(share * one.bytes)) + profile.launch_seconds
        return replace(
            one,
            shape=f"{count} x ({one.shape})",
            flops=count * one.flops,
            bytes=count * one.bytes,
            seconds=calls * call,
        )

    def moved(self, phase: Phase, name: str, size: int) -> Operation:
        """Return a reordering copy in the compute dtype."""
        return copy(phase, name, size, self.dtype, self.dtype, self.profile)


def _side_merges(load: ExpertLoad, phase: Phase) -> list[Operation]:
    """Return the merges of the auxiliaries of each side for all experts."""
    return [_side_merge(load, phase, merge) for merges in load.side_merges for merge in merges]


def _side_merge(load: ExpertLoad, phase: Phase, merge: Merge) -> Operation:
    name = f"merge {range_name(merge.left)} with {range_name(merge.right)}"
    return load.merged(phase, name, *merge_shape(load.spec, merge), load.num_experts, 1)


def _side_gradients(load: ExpertLoad) -> list[Operation]:
    """Return the projection of the gradients of the merged sides on their auxiliaries."""
    found = []
    for merges in load.side_merges:
        found += [_side_merge(load, "backward", merge) for merge in merges[:-1]]
        for merge in reversed(merges):
            m, n, k = merge_shape(load.spec, merge)
            for part, size in ((merge.left, (m, k, n)), (merge.right, (k, n, m))):
                name = f"gradient of {range_name(part)}"
                found.append(load.merged("backward", name, *size, load.num_experts, 1))
    return found


def grouped_operations(load: ExpertLoad, first: MergeSide, chunk: int) -> tuple[Operation, ...]:
    """Return the operations of rebuilding experts chunk by chunk, in order of execution.

    Args:
        load: what is to be computed.
        first: auxiliaries that meet the central tensor first.
        chunk: experts rebuilt together.
    """
    i, j = load.spec.in_features, load.spec.out_features
    forward = [
        *_side_merges(load, "forward"),
        *_rebuild_operations(load, "forward", first, chunk),
        load.each("forward", "y = x W", load.rows, j, i),
    ]
    half, whole, *reorder = _rebuild_operations(load, "backward", first, chunk)
    backward = [
        *_side_merges(load, "backward"),
        half,
        load.each("backward", "dW = x^T dy", i, j, load.rows),
        *_reorder_operations(load, "backward", "reorder dW", chunk),
        *_projection_operations(load, first, chunk),
        whole,
        *reorder,
        load.each("backward", "dx = dy W^T", load.rows, i, j),
        *_side_gradients(load),
    ]
    return (*forward, *backward)


def _rebuild_sizes(
    load: ExpertLoad, first: MergeSide
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return (m, n, k) of central times first side, and of that times the other side."""
    s = load.shape
    middle = s.central_in * s.central_out
    left, right = s.left_in * s.left_out, s.right_in * s.right_out
    if first == "left":
        return (left, middle * s.right_bond, s.left_bond), (left * middle, right, s.right_bond)
    return (s.left_bond * middle, right, s.right_bond), (left, middle * right, s.left_bond)


def _rebuild_operations(
    load: ExpertLoad, phase: Phase, first: MergeSide, chunk: int
) -> list[Operation]:
    calls = ceil(load.active / chunk)
    half, whole = _rebuild_sizes(load, first)
    return [
        load.merged(phase, f"central with {first} side", *half, load.active, calls),
        load.merged(phase, f"that with {_OTHER[first]} side", *whole, load.active, calls),
        *_reorder_operations(load, phase, "reorder W", chunk),
    ]


def _reorder_operations(load: ExpertLoad, phase: Phase, name: str, chunk: int) -> list[Operation]:
    """Reorder and cast the matrices of all experts, or their gradients, chunk by chunk."""
    s = load.shape
    stands = s.left_out == 1 and s.right_in == 1
    if stands and load.dtype == load.merge_dtype:
        return []
    size = chunk * load.spec.dense_parameters
    one = copy(phase, name, size, load.dtype, load.merge_dtype, load.profile)
    return [_scaled(one, load.active / chunk)]


def _scaled(operation: Operation, times: float) -> Operation:
    if times == 1:
        return operation
    return replace(
        operation,
        shape=f"{times:g} x ({operation.shape})",
        bytes=round(times * operation.bytes),
        seconds=times * operation.seconds,
    )


def _projection_operations(load: ExpertLoad, first: MergeSide, chunk: int) -> list[Operation]:
    """Return the gradients of both products of rebuilding, the last one first."""
    calls = ceil(load.active / chunk)
    (m, n, k), (half_m, half_n, half_k) = reversed(_rebuild_sizes(load, first))
    one, other = "gradient of the half", f"gradient of {_OTHER[first]} side"
    names = (one, other) if first == "left" else (other, one)
    products = [(names[0], (m, k, n)), (names[1], (k, n, m))]
    one, other = f"gradient of {first} side", "gradient of central"
    names = (one, other) if first == "left" else (other, one)
    products += [(names[0], (half_m, half_k, half_n)), (names[1], (half_k, half_n, half_m))]
    return [load.merged("backward", name, *size, load.active, calls) for name, size in products]


def grouped_transient_bytes(load: ExpertLoad, first: MergeSide, chunk: int) -> int:
    """Return the peak of short-lived bytes: W or dW in both dtypes, the half, gradients of cores.

    Args:
        load: what is to be computed.
        first: auxiliaries that meet the central tensor first.
        chunk: experts rebuilt together.
    """
    wide = BYTES[load.merge_dtype]
    rebuilt = load.spec.dense_parameters * (BYTES[load.dtype] + wide)
    return chunk * (rebuilt + 2 * wide * load.half_size[first]) + 4 * _core_elements(load)


def _core_elements(load: ExpertLoad) -> int:
    """Return the elements of C and of the merged sides of all experts."""
    s = load.shape
    central = s.left_bond * s.central_in * s.central_out * s.right_bond
    left = s.left_in * s.left_out * s.left_bond
    right = s.right_bond * s.right_in * s.right_out
    return central + load.num_experts * (left + right)


def factored_operations(load: ExpertLoad, keep_state: bool) -> tuple[Operation, ...]:
    """Return the operations of the factored form, in order of execution.

    Args:
        load: what is to be computed.
        keep_state: whether backward finds the output of the central product.
    """
    s, rows, tokens = load.shape, load.rows, load.tokens
    width = s.left_out * s.left_bond
    across = s.right_in * s.left_out
    inner, outer = s.central_in * s.left_bond, s.central_out * s.right_bond
    high = s.right_in * s.right_bond
    entered = s.central_in * s.right_in
    left = s.left_out * s.central_out

    def into(phase: Phase) -> list[Operation]:
        steps = _input_copy(load, phase, "input modes")
        steps.append(load.each(phase, "rows with left side", rows * entered, width, s.left_in))
        return steps + _state_copy(load, phase, 1)

    def through(phase: Phase) -> Operation:
        return load.product(phase, "rows with central", tokens * across, outer, inner)

    central = s.left_bond * s.central_in * s.central_out * s.right_bond
    cast = [copy("forward", "cast central", central, "fp32", load.dtype, load.profile)]
    forward = [*_side_merges(load, "forward"), *cast, *into("forward")]
    forward += [through("forward"), *_state_copy(load, "forward", 2)]
    forward.append(load.each("forward", "rows with right side", rows * left, s.right_out, high))
    backward = [
        *_side_merges(load, "backward"),
        replace(cast[0], phase="backward"),
        *into("backward"),
        *([] if keep_state else [through("backward"), *_state_copy(load, "backward", 2)]),
        load.each("backward", "gradient of right side", high, s.right_out, rows * left),
        load.each("backward", "back through right side", rows * left, high, s.right_out),
        *_state_copy(load, "backward", 2),
        load.product("backward", "gradient of central", inner, outer, tokens * across),
        load.product("backward", "back through central", tokens * across, inner, outer),
        *_state_copy(load, "backward", 1),
        load.each("backward", "gradient of left side", s.left_in, width, rows * entered),
        load.each("backward", "back through left side", rows * entered, s.left_in, width),
        *_input_copy(load, "backward", "gradient of input modes"),
        *_side_gradients(load),
    ]
    return (*forward, *backward)


def _input_copy(load: ExpertLoad, phase: Phase, name: str) -> list[Operation]:
    """Bring the contracted input modes of x behind the others."""
    s = load.shape
    if s.left_in == 1 or s.central_in * s.right_in == 1:
        return []
    return [load.moved(phase, f"reorder {name}", load.tokens * load.spec.in_features)]


def _state_copy(load: ExpertLoad, phase: Phase, which: int) -> list[Operation]:
    """Reorder the state before (1) or after (2) the central product, where it has to be."""
    s = load.shape
    if which == 1:
        stands = s.central_in == 1 or s.right_in * s.left_out == 1
    else:
        stands = s.right_in == 1 or s.left_out * s.central_out == 1
    if stands:
        return []
    size = load.tokens * state_sizes(s)[which - 1]
    return [load.moved(phase, f"reorder state {which}", size)]


def state_sizes(s: ExpertShape) -> tuple[int, int]:
    """Return the elements that the factored form has for each row before and after C."""
    across = s.right_in * s.left_out
    return across * s.central_in * s.left_bond, across * s.central_out * s.right_bond


def factored_saved_bytes(load: ExpertLoad) -> int:
    """Return the bytes of the output of the central product."""
    return BYTES[load.dtype] * load.tokens * state_sizes(load.shape)[1]


def factored_transient_bytes(load: ExpertLoad) -> int:
    """Return the peak of short-lived bytes in backward: reordered x, states, gradients, C."""
    before, after = state_sizes(load.shape)
    rows = load.tokens * (load.spec.in_features + 2 * before + after)
    return BYTES[load.dtype] * rows + 4 * _core_elements(load)
