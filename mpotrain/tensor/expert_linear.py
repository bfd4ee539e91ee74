"""Linear layers of experts that share the central tensor of a matrix product operator.

`expert_linear` executes a `mpotrain.tensor.expert_plan.ExpertPlan` on rows that are sorted by
expert. No plan keeps a rebuilt expert for backward: what is kept is x, the cores and, in factored
plans that ask for it, the output of the central product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpotrain.tensor.expert_factored import factored_linear
from mpotrain.tensor.expert_grouped import grouped_linear
from mpotrain.tensor.expert_plan import ExpertPlan
from mpotrain.tensor.experts import auxiliary_shapes
from mpotrain.tensor.grouped import check_bias, check_counts
from mpotrain.tensor.spec import MPOSpec


def expert_linear(
    x: Tensor,
    central: Tensor,
    auxiliaries: Sequence[Tensor],
    spec: MPOSpec,
    counts: Sequence[int],
    plan: ExpertPlan,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``y = x @ W_e + b_e`` for the rows of every expert e.

    Args:
        x: (M, in_features), rows sorted by expert, of any floating dtype.
        central: (d2, i3, j3, d3), shared by all experts; its dtype may differ from that of x.
        auxiliaries: (E, d_{k-1}, i_k, j_k, d_k) for every other core, from left to right.
        spec: the operator of one expert.
        counts: rows of each expert; their sum is M, zeros are allowed.
        plan: how to compute it, made for this spec; it holds for any number and spread of rows.
        bias: (E, out_features), or None.

    Returns:
        y (M, out_features) in the dtype of x. Every parameter gets a gradient, also those of
        experts without rows: zeros.

    Raises:
        ValueError: shapes, spec, counts and plan do not belong together.
    """
    _check(x, central, auxiliaries, spec, plan)
    check_counts(x, counts, len(auxiliaries[0]))
    check_bias(bias, len(auxiliaries[0]), spec.out_features)
    run = grouped_linear if plan.kind == "grouped" else factored_linear
    return run(x, bias, plan, tuple(counts), central, *auxiliaries)


def _check(
    x: Tensor, central: Tensor, auxiliaries: Sequence[Tensor], spec: MPOSpec, plan: ExpertPlan
) -> None:
    if plan.spec != spec:
        raise ValueError(f"the plan was made for {plan.spec}, not for {spec}")
    if x.ndim != 2 or x.shape[1] != spec.in_features:
        raise ValueError(f"x is {tuple(x.shape)}, but must be (rows, {spec.in_features})")
    expected = spec.core_shapes[spec.central_index]
    if tuple(central.shape) != expected:
        raise ValueError(f"the central tensor is {tuple(central.shape)}, but the spec {expected}")
    shapes = [tuple(tensor.shape) for tensor in auxiliaries]
    num_experts = shapes[0][0] if shapes else 0
    if shapes != [(num_experts, *shape) for shape in auxiliary_shapes(spec)]:
        raise ValueError(
            f"the auxiliaries have the shapes {shapes}, but the spec wants an expert axis of one "
            f"size and then {list(auxiliary_shapes(spec))}"
        )
    if not torch.is_floating_point(x):
        raise ValueError(f"x is {x.dtype}, but must be floating point")
