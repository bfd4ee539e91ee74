"""How one weight matrix is represented: dense, or as a matrix product operator (no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mpotrain.errors import SpecError
from mpotrain.schema import config
from mpotrain.tensor.device import DeviceProfile, DType
from mpotrain.tensor.plan import ContractionPlan, plan_contraction
from mpotrain.tensor.spec import MPOSpec, mpo_spec, ttm_spec

MOST_PADDING = 1.5
"""Products of modes above this part of a size are taken for mistakes."""

PlanChoice = Literal["auto", "materialise", "chain", "groups"]


@config
class DenseSite:
    """An ordinary matrix."""

    kind: Literal["dense"] = "dense"
    bias: bool = True
    """Whether the layer has a bias vector (sites without one by nature ignore it)."""

    def spec(self, in_features: int, out_features: int) -> MPOSpec | None:
        """Return None: a dense matrix has no cores."""
        return None


@config
class MPOSite:
    """A matrix product operator with modes of your choice.

    With neither `bonds` nor `cap` the bonds are exact: the operator can hold any matrix.
    """

    kind: Literal["mpo"] = "mpo"
    in_modes: tuple[int, ...]
    """Factors of the input size, one for each core; a product above the size means padding."""
    out_modes: tuple[int, ...]
    """Factors of the output size, one for each core; the shorter list is filled with ones."""
    bonds: tuple[int, ...] | None = None
    """Inner bond dimensions, one fewer than cores."""
    cap: int | None = None
    """One bound for all bonds, instead of `bonds`."""
    layout: Literal["ttm", "tt"] = "ttm"
    """`ttm`: core k carries input and output mode k. `tt`: output modes first, then inputs."""
    bias: bool = True
    """Whether the layer has a bias vector (sites without one by nature ignore it)."""
    init: Literal["gaussian_qr", "balanced", "xavier"] = "gaussian_qr"
    """Initialiser of the cores; it fixes the standard deviation of the rebuilt matrix."""
    plan: PlanChoice = "auto"
    """Contraction plan: the cheapest by the cost model, or one kind by name."""
    keep_weight: bool = False
    """Keep the rebuilt matrix for the backward pass (a little faster, more memory)."""

    def spec(self, in_features: int, out_features: int) -> MPOSpec:
        """Return the operator of an `in_features` x `out_features` matrix.

        Raises:
            SpecError: the modes or bonds do not fit these sizes.
        """
        return mpo_spec(
            in_features,
            out_features,
            self.in_modes,
            self.out_modes,
            bonds=self.bonds,
            cap=self.cap,
            layout=self.layout,
        )


@config
class TTMSite:
    """The shape rule of TTM GPT-2 (Chekalina et al. 2023): modes follow from the rank."""

    kind: Literal["ttm"] = "ttm"
    rank: int
    """Bond dimension of all inner bonds, and the size at which modes are grouped."""
    bias: bool = True
    """Whether the layer has a bias vector (sites without one by nature ignore it)."""
    init: Literal["gaussian_qr", "balanced", "xavier"] = "gaussian_qr"
    """Initialiser of the cores; it fixes the standard deviation of the rebuilt matrix."""
    plan: PlanChoice = "auto"
    """Contraction plan: the cheapest by the cost model, or one kind by name."""
    keep_weight: bool = False
    """Keep the rebuilt matrix for the backward pass (a little faster, more memory)."""

    def spec(self, in_features: int, out_features: int) -> MPOSpec:
        """Return the operator that the published rule gives for these sizes."""
        return ttm_spec(in_features, out_features, self.rank)


SiteConfig = Annotated[DenseSite | MPOSite | TTMSite, Field(discriminator="kind")]


def site_plan(
    site: MPOSite | TTMSite, spec: MPOSpec, tokens: int, dtype: DType, profile: DeviceProfile
) -> ContractionPlan:
    """Return the contraction plan of a site: what its layer executes and what `plan` prints.

    Args:
        site: the representation, which may force a kind of plan.
        spec: its operator (transposed for the output layer of a tied embedding).
        tokens: rows of x; 0 is planned as 1.
        dtype: dtype of x.
        profile: constants of the device.
    """
    return plan_contraction(
        spec,
        max(tokens, 1),
        dtype,
        profile,
        force=None if site.plan == "auto" else site.plan,
        keep_weight=site.keep_weight,
    )


def site_problems(
    site: DenseSite | MPOSite | TTMSite, shape: tuple[int, int], where: str
) -> list[str]:
    """Return what is wrong with `site` for a matrix of `shape` (in, out).

    Args:
        site: the representation asked for.
        shape: sizes (in_features, out_features) of the matrix.
        where: dotted key of the site, at the head of every line.

    Returns:
        One line for each problem; empty when the operator exists.
    """
    try:
        spec = site.spec(*shape)
    except SpecError as error:
        return [f"{where}: {line}" for line in str(error).splitlines()]
    if spec is None:
        return []
    sides = (
        ("in_modes", spec.in_features, spec.padded_in),
        ("out_modes", spec.out_features, spec.padded_out),
    )
    return [
        f"{where}.{key}: the modes multiply to {padded}, more than {MOST_PADDING} times the size "
        f"{size}; nearly all of the operator would be padding"
        for key, size, padded in sides
        if padded > MOST_PADDING * size
    ]
