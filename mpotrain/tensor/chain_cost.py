"""What a chain over groups of cores costs, and in which layout its steps are done (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpotrain.tensor.cost import (
    Operation,
    Phase,
    copy,
    gemm,
    merge_operations,
    project_operations,
    range_name,
)
from mpotrain.tensor.device import DeviceProfile, DType
from mpotrain.tensor.spec import MPOSpec
from mpotrain.tensor.steps import STANDARD, ChainStep, needs_copy
from mpotrain.tensor.tree import merge_order, merged_size


@dataclass(frozen=True)
class _Setting:
    """What the cost of every step depends on."""

    tokens: int
    dtype: DType
    profile: DeviceProfile

    def copy(self, phase: Phase, name: str, size_per_token: int) -> Operation:
        size = self.tokens * size_per_token
        return copy(phase, name, size, self.dtype, self.dtype, self.profile)

    def gemm(self, phase: Phase, name: str, m: int, n: int, k: int, batch: int = 1) -> Operation:
        return gemm(phase, name, m, n, k, dtype=self.dtype, profile=self.profile, batch=batch)


def lay_out(
    steps: Sequence[ChainStep], tokens: int, dtype: DType, profile: DeviceProfile
) -> tuple[ChainStep, ...]:
    """Return the steps, each in the layout that is cheaper behind the step before it."""
    setting = _Setting(tokens, dtype, profile)
    chosen: list[ChainStep] = []
    for step in steps:
        options = [replace(step, batched=False)]
        if step.width > 1:
            options.append(replace(step, batched=True))

        def seconds(option: ChainStep) -> float:
            before = chosen[-1] if chosen else None
            operations = (
                *_enter("backward", option, before, setting),
                *_enter("forward", option, before, setting),
                _product("forward", option, setting),
                *_gradients(option, None, setting),
            )
            return sum(operation.seconds for operation in operations)

        chosen.append(min(options, key=seconds))
    return tuple(chosen)


def chain_operations(
    spec: MPOSpec,
    steps: Sequence[ChainStep],
    tokens: int,
    dtype: DType,
    profile: DeviceProfile,
) -> tuple[Operation, ...]:
    """Return the operations of contracting x group by group, in order of execution."""
    setting = _Setting(tokens, dtype, profile)

    def matrices(phase: Phase) -> Iterator[Operation]:
        for step in steps:
            yield from merge_operations(phase, spec, merge_order(spec, *step.group), profile)
            size = merged_size(spec, step.group)
            yield copy(phase, f"reorder {range_name(step.group)}", size, "fp32", dtype, profile)

    def states(phase: Phase) -> Iterator[Operation]:
        before = None
        for index, step in enumerate(steps):
            yield from _enter(phase, step, before, setting)
            if phase == "forward" or index < len(steps) - 1:
                yield _product(phase, step, setting)
            before = step

    operations = [*matrices("forward"), *states("forward")]
    last, first = steps[-1], steps[0]
    if not last.batched and last.width > 1:
        operations.append(setting.copy("forward", "reorder y", last.outer * last.rows * last.width))
    operations += [*matrices("backward"), *states("backward")]
    for step, after in reversed(list(zip(steps, [*steps[1:], None], strict=True))):
        operations += _gradients(step, after, setting)
    if needs_copy(first.entry_order, STANDARD, first.axes):
        operations.append(setting.copy("backward", "reorder dx", first.state_size))
    for step in steps:
        size = merged_size(spec, step.group)
        name = f"reorder gradient of {range_name(step.group)}"
        operations.append(copy("backward", name, size, dtype, "fp32", profile))
        operations += project_operations(spec, merge_order(spec, *step.group), profile)
    return tuple(operations)


def _enter(
    phase: Phase, step: ChainStep, before: ChainStep | None, setting: _Setting
) -> Iterator[Operation]:
    """Yield the reordering of the state before a step, where there is one."""
    held = before.exit_order if before is not None else STANDARD
    if needs_copy(held, step.entry_order, step.axes):
        yield setting.copy(phase, f"reorder state for {range_name(step.group)}", step.state_size)


def _product(phase: Phase, step: ChainStep, setting: _Setting) -> Operation:
    batch, name = setting.tokens * step.outer, f"x with {range_name(step.group)}"
    if step.batched:
        return setting.gemm(phase, name, step.rows, step.width, step.inner, batch)
    return setting.gemm(phase, name, batch * step.width, step.rows, step.inner)


def _gradients(step: ChainStep, after: ChainStep | None, setting: _Setting) -> Iterator[Operation]:
    """Yield the operations of the gradients of a step's matrix and of its incoming state."""
    batch, label = setting.tokens * step.outer, range_name(step.group)
    produced = step.outer * step.rows * step.width
    if after is not None:
        reorder = needs_copy(after.entry_order, step.exit_order, after.axes)
    else:
        reorder = not step.batched and step.width > 1
    if reorder:
        yield setting.copy("backward", f"reorder gradient at {label}", produced)
    if step.batched:
        size = step.state_size + produced
        yield setting.copy("backward", f"fold state and gradient at {label}", size)
    count = batch * step.width
    yield setting.gemm("backward", f"gradient of {label}", step.rows, step.inner, count)
    name = f"gradient of the state at {label}"
    if step.batched:
        yield setting.gemm("backward", name, step.inner, step.width, step.rows, batch)
    else:
        yield setting.gemm("backward", name, count, step.inner, step.rows)
