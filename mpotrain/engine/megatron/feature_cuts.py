"""Where the matrices of a network meet, and by which periods they can be cut there (no torch).

Heads lie between the projections of attention and its output matrix, inner features between the
two matrices of a feed-forward layer or of an expert. All matrices that meet must be cut by one
period, see `mpotrain.engine.megatron.periods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Literal

from mpotrain.engine.megatron.periods import (
    Face,
    ModeCut,
    Side,
    choose_period,
    common_periods,
)
from mpotrain.errors import ParallelError
from mpotrain.models.config import AnyModel
from mpotrain.models.sites import Site
from mpotrain.models.t5_config import T5Config
from mpotrain.tensor.spec import MPOSpec

Place = Literal["attention", "ffn", "expert"]

SIDES: dict[str, tuple[Place, Side]] = {
    "sites.qkv": ("attention", "out"),
    "sites.query": ("attention", "out"),
    "sites.key": ("attention", "out"),
    "sites.value": ("attention", "out"),
    "sites.attention_out": ("attention", "in"),
    "sites.c_fc": ("ffn", "out"),
    "sites.c_proj": ("ffn", "in"),
    "moe.c_fc": ("expert", "out"),
    "moe.c_proj": ("expert", "in"),
}
"""Where each matrix of a block meets others, and with which of its sides."""


@dataclass(frozen=True)
class FeaturePeriods:
    """The period of each kind of features; all features where nothing is cut.

    Attributes:
        attention: features of all heads, between projections and output matrix.
        ffn: inner features of a feed-forward layer.
        expert: inner features of an expert, cut over expert-tensor ranks.
    """

    attention: int
    ffn: int
    expert: int


@dataclass(frozen=True)
class Meeting:
    """Matrices around the same features.

    Attributes:
        place: which features.
        faces: the sides of the matrices that meet; () where the network has none of them.
        features: number of features.
        unit: features that stay together (a head).
        parts: ranks that share them.
    """

    place: Place
    faces: tuple[Face, ...]
    features: int
    unit: int
    parts: int

    def period(self) -> int | None:
        """Return the period to cut by; None where there is none."""
        if not self.faces:
            return self.features
        return choose_period(self.faces, self.parts, self.unit)


def head_size(model: AnyModel) -> int:
    """Return the features of an attention head."""
    return model.head_size if isinstance(model, T5Config) else model.hidden_size // model.num_heads


def meetings(model: AnyModel, tensor: int, expert_tensor: int) -> list[Meeting]:
    """Return all places where matrices meet: attention, feed-forward layer, expert.

    Args:
        model: a network without problems of its own.
        tensor: ranks that share every matrix.
        expert_tensor: ranks that share every expert's matrices.
    """
    sites = {site.key: site for site in model.all_sites() if site.key in SIDES}
    size = head_size(model)
    features: dict[Place, tuple[int, int, int]] = {
        "attention": (model.num_heads * size, size, tensor),
        "ffn": (model.ffn_size, 1, tensor),
        "expert": (model.ffn_size, 1, expert_tensor),
    }
    found = []
    for place, (span, unit, parts) in features.items():
        faces = tuple(
            _face(site, side, span)
            for key, site in sites.items()
            for where, side in [SIDES[key]]
            if where == place
        )
        found.append(Meeting(place, faces, span, unit, parts))
    return found


def feature_periods(model: AnyModel, tensor: int, expert_tensor: int) -> FeaturePeriods:
    """Return the period of all features that are cut.

    Args:
        model: a network without problems of its own.
        tensor: ranks that share every matrix.
        expert_tensor: ranks that share every expert's matrices.

    Raises:
        ParallelError: some features cannot be cut; `feature_problems` says so in advance.
    """
    periods = {
        meeting.place: meeting.period() for meeting in meetings(model, tensor, expert_tensor)
    }
    attention, ffn, expert = (periods[place] for place in ("attention", "ffn", "expert"))
    if attention is None or ffn is None or expert is None:
        raise ParallelError("\n".join(feature_problems(model, tensor, expert_tensor)))
    return FeaturePeriods(attention, ffn, expert)


@dataclass(frozen=True)
class RankPart:
    """What a rank holds of the matrix of a site, with the biases of the matrix.

    Attributes:
        parts: ranks among which its features are shared out; 1 = the matrix is held whole.
        side: on which side it is cut.
        cut: the mode of its operator that is cut; None of a dense or whole matrix.
    """

    parts: int
    side: Side
    cut: ModeCut | None

    def spec(self, whole: MPOSpec) -> MPOSpec:
        """Return the operator that the rank multiplies by; bonds stay those of the whole."""
        if self.cut is None:
            return whole
        wide = replace(whole, allow_redundant_bonds=True)
        modes = list(whole.in_modes if self.side == "in" else whole.out_modes)
        modes[self.cut.core] //= self.parts
        if self.side == "in":
            rows = whole.in_features // self.parts
            return replace(wide, in_modes=tuple(modes), in_features=rows)
        columns = whole.out_features // self.parts
        return replace(wide, out_modes=tuple(modes), out_features=columns)


WHOLE = RankPart(1, "out", None)
"""A matrix that every rank holds and computes alike."""


def rank_part(site: Site, periods: FeaturePeriods, tensor: int, expert_tensor: int = 1) -> RankPart:
    """Return what a rank holds of the matrix of a site.

    Args:
        site: of the network.
        periods: how features are cut.
        tensor: ranks that share every matrix.
        expert_tensor: ranks that share every expert's matrices.
    """
    if site.key not in SIDES:
        return WHOLE
    place, side = SIDES[site.key]
    parts = expert_tensor if place == "expert" else tensor
    period: int = getattr(periods, place)
    if parts == 1 or site.spec is None:
        return RankPart(parts, side, None)
    cut = _face(site, side, period).cut(period, parts)
    assert cut is not None, f"{site.name} has no cut by {period}: feature_problems was not asked"
    return RankPart(parts, side, cut)


def feature_problems(model: AnyModel, tensor: int, expert_tensor: int) -> list[str]:
    """Return why features cannot be cut over so many ranks, one line each, with what would do.

    Args:
        model: a network without problems of its own.
        tensor: ranks that share every matrix.
        expert_tensor: ranks that share every expert's matrices.
    """
    found = []
    places = meetings(model, tensor, expert_tensor)
    for meeting in places:
        if meeting.period() is not None:
            continue
        instead = _instead(meeting, places)
        key = "parallel.expert_tensor" if meeting.place == "expert" else "parallel.tensor"
        count = meeting.features // meeting.unit
        if count % meeting.parts:
            what = "heads (model.num_heads)" if meeting.unit > 1 else "inner features"
            found.append(
                f"{key}: {meeting.parts} ranks do not divide the {count} {what}; {instead}"
            )
            continue
        alone = [face for face in meeting.faces if not common_periods([face], *_by(meeting))]
        found += [_face_problem(face, meeting, f"{key}={meeting.parts}", instead) for face in alone]
        if not alone:
            found.append(_common_problem(meeting, f"{key}={meeting.parts}", instead))
    return found


def _face(site: Site, side: Side, span: int) -> Face:
    features = site.in_features if side == "in" else site.out_features
    return Face(f"model.{site.key}", features, site.spec, side, span)


def _by(meeting: Meeting) -> tuple[int, int]:
    return meeting.parts, meeting.unit


def _instead(meeting: Meeting, places: Sequence[Meeting]) -> str:
    """Say which degrees near the one asked for would do."""
    if meeting.place == "expert":
        return "use parallel.expert_tensor=1"
    dense = [place for place in places if place.place != "expert"]

    def fits(parts: int) -> bool:
        return all(replace(place, parts=parts).period() is not None for place in dense)

    parts, most = meeting.parts, min(place.features // place.unit for place in dense)
    below = next(degree for degree in range(min(parts - 1, most), 0, -1) if fits(degree))
    above = next((d for d in range(parts + 1, min(4 * parts, most) + 1) if fits(d)), None)
    choices = str(below) if above is None else f"{below} or {above}"
    return f"use parallel.tensor={choices}"


def _face_problem(face: Face, meeting: Meeting, degree: str, instead: str) -> str:
    modes = list(face.modes())
    if face.is_padded():
        return (
            f"{face.name}: its {face.side} modes {modes} multiply to {prod(modes)}, more than the "
            f"{face.features} features, and padding cannot be shared out ({degree}); modes that "
            f"multiply to {face.features} would do, or {instead}"
        )
    kept = f" with whole heads of {meeting.unit}" if meeting.unit > 1 else ""
    reason = (
        f"{face.name}: no core has an {face.side} mode among {modes} that falls into "
        f"{meeting.parts} equal parts{kept} ({degree})"
    )
    other = _other_modes(face, meeting)
    # The modes of other kinds follow from their sizes and ranks.
    others = f'kind = "mpo" with {face.side} modes {other} would do, or ' if other else ""
    return f"{reason}; {others}{instead}"


def _common_problem(meeting: Meeting, degree: str, instead: str) -> str:
    offers = "; ".join(
        f"{face.side} modes {list(face.modes())} of {face.name} offer "
        f"{', '.join(map(str, common_periods([face], *_by(meeting))[:4]))}"
        for face in meeting.faces
        if face.spec is not None
    )
    return (
        f"{meeting.faces[0].name}: no period of features is common to all matrices that meet there "
        f"({degree}): {offers}; give them the same modes on these sides, or {instead}"
    )


def _other_modes(face: Face, meeting: Meeting) -> list[int] | None:
    """Return modes of the same product that can be cut: factors moved from one core to another."""
    modes, parts = list(face.modes()), meeting.parts
    for into in range(len(modes)):
        for source in range(len(modes)):
            factor = parts // gcd(modes[into], parts)
            if into == source or factor == 1 or modes[source] % factor:
                continue
            moved = list(modes)
            moved[into] *= factor
            moved[source] //= factor
            if _would_do(face, tuple(moved), meeting):
                return moved
    return None


def _would_do(face: Face, modes: tuple[int, ...], meeting: Meeting) -> bool:
    spec = face.spec
    assert spec is not None
    thin = replace(spec, bonds=(1,) * len(spec.bonds))
    is_in = face.side == "in"
    changed = replace(thin, in_modes=modes) if is_in else replace(thin, out_modes=modes)
    return bool(common_periods([replace(face, spec=changed)], *_by(meeting)))
