"""Lookup in a factorised table: both ways, against the rebuilt table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import SPECS, random_cores, random_tensor, specs
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from mpotrain.tensor.contract import embedding, rebuild
from mpotrain.tensor.lookup import lookup_rows, row_by_row_is_cheaper
from mpotrain.tensor.spec import mpo_spec

TABLE = mpo_spec(1000, 60, (8, 16, 8), (4, 4, 4), cap=8)


def test_the_cheaper_way_is_taken():
    assert row_by_row_is_cheaper(TABLE, 1, "cpu")
    assert not row_by_row_is_cheaper(TABLE, 10**6, "cpu")
    large = mpo_spec(50257, 768, (35, 40, 36), (8, 12, 8), cap=64)
    assert row_by_row_is_cheaper(large, 1, "cuda")
    assert not row_by_row_is_cheaper(large, 10**6, "cuda")


@settings(max_examples=40, deadline=None)
@given(spec=specs(), seed=st.integers(0, 99), count=st.integers(0, 7))
def test_both_ways_equal_the_rebuilt_table(spec, seed, count):
    cores = random_cores(spec, seed)
    ids = torch.randint(spec.in_features, (count,), generator=torch.Generator().manual_seed(seed))
    weight = random_tensor(count, spec.out_features)
    expected = rebuild(cores, spec)[ids]
    wanted = torch.autograd.grad((expected * weight).sum(), cores)
    for rows in (lookup_rows(ids, spec, torch.float64, *cores), embedding(ids, cores, spec)):
        torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-12)
        found = torch.autograd.grad((rows * weight).sum(), cores)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (40, 50), ()])
def test_shapes_and_repeated_ids(shape):
    """(40, 50) is looked up in the rebuilt table, the others row by row."""
    cores = random_cores(TABLE)
    count = int(torch.tensor(shape).prod()) if shape else 1
    assert row_by_row_is_cheaper(TABLE, count, "cpu") == (count < 100)
    ids = (torch.arange(count).reshape(shape) * 7) % 5
    rows = embedding(ids, cores, TABLE)
    table = rebuild(cores, TABLE)
    expected = functional.embedding(ids, table)
    torch.testing.assert_close(rows, expected)
    ours = torch.autograd.grad(rows.square().sum(), cores)
    theirs = torch.autograd.grad(expected.square().sum(), cores)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("count", [2, 4000])
def test_saves_ids_and_cores_alone(count):
    cores = random_cores(TABLE, dtype=torch.float32)
    ids = torch.arange(count) % 1000
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        embedding(ids, cores, TABLE)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    assert num_bytes == ids.nbytes + sum(core.nbytes for core in cores)


@pytest.mark.parametrize("count", [2, 4000])
def test_finite_differences_and_frozen_cores(count):
    spec = mpo_spec(11, 7, (2, 3, 2), (2, 2, 2), cap=3)
    cores = random_cores(spec)
    ids = torch.arange(count) % 11
    if count == 2:
        assert torch.autograd.gradcheck(
            lambda *c: lookup_rows(ids, spec, torch.float64, *c), tuple(cores)
        )
    cores[1] = cores[1].detach()
    embedding(ids, cores, spec).sum().backward()
    assert cores[1].grad is None
    assert cores[0].grad is not None


@pytest.mark.parametrize("ids", [[-1], [1000], [3, 1023], [5] * 3000 + [1000]])
def test_ids_outside_the_table_are_refused(ids):
    """1000..1023 are padded rows: they exist in the cores but not in the table."""
    with pytest.raises(IndexError, match="0 to 999"):
        embedding(torch.tensor(ids), random_cores(TABLE), TABLE)


def test_dtypes():
    cores = random_cores(TABLE, dtype=torch.bfloat16)
    for count in (2, 4000):
        ids = torch.arange(count, dtype=torch.int32) % 1000
        assert embedding(ids, cores, TABLE).dtype == torch.bfloat16
        wide = embedding(ids, cores, TABLE, torch.float32)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide, rebuild(cores, TABLE)[ids.long()])


def test_padded_table_of_all_cases():
    for spec in SPECS.values():
        cores = random_cores(spec)
        ids = torch.arange(spec.in_features)
        torch.testing.assert_close(embedding(ids, cores, spec), rebuild(cores, spec))
