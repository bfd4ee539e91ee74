"""The operator of a rank that holds some inner features of every expert."""

from __future__ import annotations

from math import prod
from typing import get_args

import pytest
import torch

from mpotrain.engine.megatron.feature_cuts import RankPart
from mpotrain.engine.megatron.periods import Face, Side
from mpotrain.engine.megatron.placement import Cut
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.spec import exact_bonds, mpo_spec

MODES = (4, 6, 2)
PARTS = 2


@pytest.mark.parametrize("side", get_args(Side))
@pytest.mark.parametrize("period", [2, 4, 6, 12, 24, 48])
def test_cores_of_a_rank_rebuild_its_features(side: Side, period: int) -> None:
    other = (3, 2, 2)
    modes = (MODES, other) if side == "in" else (other, MODES)
    sizes = [prod(of_side) for of_side in modes]
    spec = mpo_spec(sizes[0], sizes[1], modes[0], modes[1])
    assert spec.bonds == exact_bonds(*modes)
    cut = Face("site", 48, spec, side, 48).cut(period, PARTS)
    if cut is None:
        assert period in (6,)
        return
    generator = torch.Generator().manual_seed(0)
    cores = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in spec.core_shapes
    ]
    whole = rebuild(cores, spec)
    part = RankPart(PARTS, side, cut).spec(spec)
    for index in range(PARTS):
        mine = list(cores)
        mine[cut.core] = Cut(1 if side == "in" else 2, PARTS, index, cut.period).take(
            cores[cut.core]
        )
        assert tuple(tuple(core.shape) for core in mine) == part.core_shapes
        wanted = Cut(0 if side == "in" else 1, PARTS, index, period).take(whole)
        torch.testing.assert_close(rebuild(mine, part), wanted, rtol=1e-12, atol=1e-12)
