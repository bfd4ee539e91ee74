"""How a layer is computed: rebuild W, or contract the input group by group (torch-free).

`plan_contraction` takes shapes and a device profile and returns a printable `ContractionPlan`,
which `mpotrain.tensor.contract.linear` executes. The candidates are

* materialise: merge all cores to W and do one matrix product (the usual winner in training);
* chain: contract the input with one core after the other;
* groups: merge neighbouring cores into at least two groups, then chain over the groups;

the latter two from the left ("lr") and from the right ("rl"). Whatever the plan, backward needs
the input and the cores alone and recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

from mpotrain.errors import SpecError
from mpotrain.tensor.chain_cost import chain_operations, lay_out
from mpotrain.tensor.cost import (
    Operation,
    dense_cost,
    materialise_operations,
    operations_table,
)
from mpotrain.tensor.device import BYTES, PROFILES, DeviceProfile, DType
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.steps import STANDARD, ChainStep, Direction, chain_steps, needs_copy
from mpotrain.tensor.tree import Merge, Range, merge_order, merged_size

__all__ = [
    "PROFILES",
    "ContractionPlan",
    "DeviceProfile",
    "Kind",
    "dense_cost",
    "plan_contraction",
]

Kind = Literal["materialise", "chain", "groups"]

_MOST_CORES_FOR_ALL_GROUPINGS = 10


@dataclass(frozen=True)
class ContractionPlan:
    """One way of computing y = x W and its gradients, with its predicted cost.

    Attributes:
        spec: the cores.
        tokens: rows of x for which the cost was predicted; the plan is valid for any number.
        dtype: dtype of x and y.
        profile: name of the device profile.
        kind: materialise, chain or groups.
        groups: ranges of cores that are merged before x is touched.
        direction: order in which x meets the groups; None when there is one group.
        steps: the products with the groups in order of execution, with their layouts; empty when
            W is materialised.
        keep_weight: whether forward keeps W for backward (materialise only).
        forward_flops: FLOPs of the matrix products of forward.
        backward_flops: FLOPs of backward when every gradient is wanted.
        bytes: bytes read and written in forward and backward.
        seconds: predicted time of forward and backward.
        saved_bytes: bytes kept for backward beside x and the cores.
        transient_bytes: peak of short-lived bytes beside x, y, their gradients and the cores.
        ratio: `seconds` over the predicted time of a dense layer.
        flops_ratio: FLOPs over the FLOPs of a dense layer.
        operations: the single operations, in order of execution.
    """

    spec: MPOSpec
    tokens: int
    dtype: DType
    profile: str
    kind: Kind
    groups: tuple[Range, ...]
    direction: Direction | None
    steps: tuple[ChainStep, ...]
    keep_weight: bool
    forward_flops: int
    backward_flops: int
    bytes: int
    seconds: float
    saved_bytes: int
    transient_bytes: int
    ratio: float
    flops_ratio: float
    operations: tuple[Operation, ...] = field(repr=False, compare=False)

    @property
    def merges(self) -> tuple[tuple[Merge, ...], ...]:
        """Merge order of every group (empty for a group of one core)."""
        return tuple(merge_order(self.spec, first, last) for first, last in self.groups)

    @property
    def summary(self) -> str:
        """The plan in one line."""
        how: str = self.kind
        if self.kind == "materialise":
            how += ", W kept" if self.keep_weight else ", W rebuilt in backward"
        else:
            sizes = "+".join(str(last - first + 1) for first, last in self.groups)
            how += f" {sizes} {self.direction}"
        return (
            f"{self.spec.in_features} x {self.spec.out_features}, {self.tokens} tokens, "
            f"{self.dtype} on {self.profile}: {how}; {self.ratio:.2f} x dense time, "
            f"{self.flops_ratio:.2f} x dense FLOPs, saves {_bytes(self.saved_bytes)}, "
            f"transient {_bytes(self.transient_bytes)}"
        )

    def describe(self) -> str:
        """Return the plan as a table of operations with FLOPs, bytes and time."""
        flops = self.forward_flops + self.backward_flops
        table = operations_table(self.operations, flops, self.bytes, self.seconds)
        return f"{self.summary}\n{table}"


@lru_cache(maxsize=4096)
def plan_contraction(
    spec: MPOSpec,
    tokens: int,
    dtype: DType,
    profile: DeviceProfile,
    *,
    force: str | None = None,
    keep_weight: bool = False,
    transient_limit: int | None = None,
) -> ContractionPlan:
    """Return the plan with the least predicted time of forward and backward.

    Args:
        spec: the cores.
        tokens: rows of x (tokens of a micro-batch on one rank).
        dtype: dtype of x.
        profile: constants of the device.
        force: restrict the candidates: "materialise", "chain" or "groups", where wanted followed
            by the direction and, for groups, their sizes: "chain:rl", "groups:2+3:lr".
        keep_weight: let a materialise plan keep W for backward instead of rebuilding it.
        transient_limit: pass over chains and groups that need more `transient_bytes`.

    Raises:
        SpecError: `force` is unknown or impossible for this spec, or `dtype` is unknown.
    """
    if dtype not in BYTES:
        raise SpecError(f"dtype is {dtype!r}; plans know {', '.join(sorted(BYTES))}")
    candidates = _candidates(spec, force)
    plans = [
        _plan(spec, max(tokens, 1), dtype, profile, candidate, keep_weight)
        for candidate in candidates
    ]
    if transient_limit is not None and force is None:
        plans = [
            plan
            for plan in plans
            if plan.kind == "materialise" or plan.transient_bytes <= transient_limit
        ]
    return min(plans, key=lambda plan: plan.seconds)


_Candidate = tuple[Kind, tuple[Range, ...], Direction | None]


def _candidates(spec: MPOSpec, force: str | None) -> list[_Candidate]:
    """Return the plans to compare; of plans with equal time the first one wins."""
    kind, wanted_sizes, wanted_direction = _parse_force(force)
    candidates: list[_Candidate] = [("materialise", ((0, spec.num_cores - 1),), None)]
    for groups in _groupings(spec.num_cores):
        this: Kind = "chain" if len(groups) == spec.num_cores else "groups"
        candidates += [(this, groups, direction) for direction in get_args(Direction)]
    matching = [
        candidate
        for candidate in candidates
        if kind in (None, candidate[0])
        and wanted_direction in (None, candidate[2])
        and wanted_sizes in (None, tuple(b - a + 1 for a, b in candidate[1]))
    ]
    if not matching:
        raise SpecError(
            f"plan {force!r} is not possible for {spec.num_cores} cores; use 'materialise', "
            "'chain' or (for 3 cores and more) 'groups'"
        )
    return matching


def _parse_force(
    force: str | None,
) -> tuple[str | None, tuple[int, ...] | None, str | None]:
    if force is None:
        return None, None, None
    kind, *options = force.split(":")
    sizes: tuple[int, ...] | None = None
    direction: str | None = None
    valid = kind in get_args(Kind)
    for option in options:
        if option in get_args(Direction) and kind != "materialise":
            direction = option
        elif kind == "groups" and all(part.isdigit() for part in option.split("+")):
            sizes = tuple(int(part) for part in option.split("+"))
        else:
            valid = False
    if not valid:
        raise SpecError(
            f"plan {force!r} is unknown; use 'materialise', 'chain', 'chain:lr', 'chain:rl', "
            "'groups' or for example 'groups:2+3:rl'"
        )
    return kind, sizes, direction


def _groupings(num_cores: int) -> Iterator[tuple[Range, ...]]:
    """Yield the ways of cutting the cores into at least two contiguous groups.

    With very many cores only cuts into at most three groups and the chain of single cores are
    listed: more groups move more token-sized data and have never been the fastest.
    """
    for mask in range(1, 1 << (num_cores - 1)):
        cuts = mask.bit_count()
        few = cuts <= 2 or cuts == num_cores - 1
        if num_cores > _MOST_CORES_FOR_ALL_GROUPINGS and not few:
            continue
        ends = [k for k in range(num_cores - 1) if mask >> k & 1]
        firsts = [0, *(end + 1 for end in ends)]
        yield tuple(zip(firsts, [*ends, num_cores - 1], strict=True))


def _plan(
    spec: MPOSpec,
    tokens: int,
    dtype: DType,
    profile: DeviceProfile,
    candidate: _Candidate,
    keep_weight: bool,
) -> ContractionPlan:
    kind, groups, direction = candidate
    keep = keep_weight and kind == "materialise"
    steps: tuple[ChainStep, ...] = ()
    if direction is None:
        operations = materialise_operations(spec, tokens, dtype, profile, keep)
        transient = _materialise_transient(spec, dtype)
    else:
        steps = lay_out(chain_steps(spec, groups, direction), tokens, dtype, profile)
        operations = chain_operations(spec, steps, tokens, dtype, profile)
        transient = _chain_transient(spec, steps, tokens, dtype)
    dense = dense_cost(spec.in_features, spec.out_features, tokens, dtype, profile)
    forward = sum(op.flops for op in operations if op.phase == "forward")
    backward = sum(op.flops for op in operations if op.phase == "backward")
    seconds = sum(op.seconds for op in operations)
    return ContractionPlan(
        spec=spec,
        tokens=tokens,
        dtype=dtype,
        profile=profile.name,
        kind=kind,
        groups=groups,
        direction=direction,
        steps=steps,
        keep_weight=keep,
        forward_flops=forward,
        backward_flops=backward,
        bytes=sum(op.bytes for op in operations),
        seconds=seconds,
        saved_bytes=spec.padded_in * spec.padded_out * BYTES[dtype] if keep else 0,
        transient_bytes=transient,
        ratio=seconds / dense.seconds,
        flops_ratio=(forward + backward) / (dense.forward_flops + dense.backward_flops),
        operations=operations,
    )


def _materialise_transient(spec: MPOSpec, dtype: DType) -> int:
    """Bytes of W (or dW) in the compute dtype and in fp32, and of the partial products."""
    merges = merge_order(spec, 0, spec.num_cores - 1)
    partial = sum(merged_size(spec, merge.result) for merge in merges[:-1])
    return spec.padded_in * spec.padded_out * (BYTES[dtype] + 4) + 4 * partial


def _chain_transient(spec: MPOSpec, steps: tuple[ChainStep, ...], tokens: int, dtype: DType) -> int:
    """Bytes of the states that backward recomputes, of their largest gradient, of the groups."""
    sizes = [step.state_size for step in steps[1:]]
    if needs_copy(STANDARD, steps[0].entry_order, steps[0].axes):
        sizes.append(steps[0].state_size)
    merged = sum(merged_size(spec, step.group) for step in steps)
    return BYTES[dtype] * (tokens * (sum(sizes) + max(sizes)) + merged) + 4 * merged


def _bytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count else "0 MiB"
