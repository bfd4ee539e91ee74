"""Sizes of T5 without torch: published numbers, and equality with the built model."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from mpotrain.models.t5_config import T5Config, T5Sites
from mpotrain.nn.config import DenseSite, MPOSite, TTMSite
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.sample import SampleLengths

BASE = Path(__file__).resolve().parents[3] / "configs" / "base"
TINY = T5Config(
    vocab_size=100, hidden_size=24, head_size=5, num_layers=2, num_heads=4, ffn_size=96,
    relative_buckets=8, relative_distance=20,
)  # fmt: skip
MPO_FC = MPOExpertSite(start="independent", in_modes=(2, 6, 2), out_modes=(4, 6, 4))
MPO_PROJ = MPOExpertSite(in_modes=(4, 6, 4), out_modes=(2, 6, 2), cap=5)
CASES = [
    TINY,
    replace(TINY, num_decoder_layers=4),
    replace(TINY, num_layers=3, num_decoder_layers=1),
    replace(
        TINY,
        sites=T5Sites(
            embedding=MPOSite(in_modes=(5, 7, 3), out_modes=(2, 4, 3), cap=6),
            query=MPOSite(in_modes=(4, 6), out_modes=(4, 5), cap=5),
            key=TTMSite(rank=3),
            value=DenseSite(bias=True),
            attention_out=MPOSite(in_modes=(4, 5), out_modes=(4, 6), layout="tt", cap=8),
            c_fc=TTMSite(rank=8),
            c_proj=MPOSite(in_modes=(8, 12), out_modes=(4, 6)),
        ),
    ),
    replace(TINY, moe=MoEConfig(num_experts=3)),
    replace(
        TINY,
        num_decoder_layers=3,
        sites=T5Sites(c_fc=TTMSite(rank=8)),
        moe=MoEConfig(
            num_experts=4, every=2, c_fc=MPO_FC, c_proj=MPO_PROJ,
            router=RouterConfig(top_k=2, bias=True, balance_rate=0.001),
        ),
    ),
    replace(
        TINY,
        num_layers=5,
        moe=MoEConfig(
            num_experts=4,
            c_fc=AsymmetricExpertSite(in_mode=6, out_mode=8, in_bond=3),
            c_proj=DenseExpertSite(bias=False),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CASES)
def test_foretold_parameters_and_buffers_equal_those_of_the_model(config: T5Config) -> None:
    from mpotrain.models.seq2seq import T5
    from mpotrain.nn.roles import experts_of, role_of

    assert config.problems("model") == []
    model = T5(config, seed=0)
    built = {
        name: (tuple(p.shape), str(role_of(p)), experts_of(p))
        for name, p in model.named_parameters()
    }
    foretold = {p.name: (p.shape, p.role, p.num_experts) for p in config.parameters()}
    assert built == foretold
    assert len(list(config.parameters())) == len(foretold)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    buffers = {n: tuple(b.shape) for n, b in model.named_buffers() if n in model.state_dict()}
    assert buffers == {buffer.name: buffer.shape for buffer in config.buffers()}


def shipped(*names: str, **moe: Any) -> T5Config:
    """Return the model of base files laid over one another."""
    model: dict[str, Any] = {}
    for name in names:
        model |= tomllib.loads((BASE / f"{name}.toml").read_text())["model"]
    if moe:
        model["moe"] |= moe
    return TypeAdapter(T5Config).validate_json(json.dumps(model))


@pytest.mark.parametrize(("name", "count"), [("base", 222_903_552), ("large", 737_668_096)])
def test_published_sizes_of_t5(name: str, count: int) -> None:
    model = shipped(f"t5-{name}")
    assert model.problems("model") == []
    assert model.num_parameters() == model.body_parameters() == model.active_parameters() == count


@pytest.mark.parametrize(
    ("experts", "count"), [(4, 258_369_792), (8, 293_836_032), (16, 364_768_512)]
)
def test_published_sizes_of_mpoe_on_t5_base(experts: int, count: int) -> None:
    """Gao et al. 2022, tables 1 and 2: 258, 294 and 365 millions; routers are apart."""
    model = shipped("t5-base", "mpoe-t5", num_experts=experts)
    assert model.problems("model") == []
    assert model.body_parameters() == count
    routers = 24 * 768 * experts
    assert model.num_parameters() == count + routers
    # Each matrix of an expert has 184,720 parameters beside the shared central tensor.
    assert count == 222_903_552 + 48 * 184_720 * experts
    assert model.active_parameters() == 222_903_552 + 48 * 184_720 + routers


def test_dense_experts_on_t5_base() -> None:
    """Switch and MoE rows of the same table: 1015 millions."""
    model = shipped("t5-base", "mpoe-t5", num_experts=8, c_fc={"kind": "dense"},
                    c_proj={"kind": "dense"})  # fmt: skip
    assert model.body_parameters() == 1_015_627_008


def test_shapes_of_mpoe_on_t5_large() -> None:
    model = shipped("t5-large", "mpoe-t5-large", num_experts=8)
    assert model.problems("model") == []
    sizes = {p.name: p.size for p in model.parameters()}
    auxiliaries = 0
    for matrix in ("c_fc", "c_proj"):
        site = f"decoder.blocks.23.ffn.{matrix}"
        assert sizes[f"{site}.central"] == 1024 * 4096
        own = [size for name, size in sizes.items() if name.startswith(f"{site}.auxiliaries")]
        auxiliaries += sum(own) // 8
    assert model.body_parameters() == 737_668_096 + 8 * 48 * auxiliaries


def test_tiny_model_is_whole() -> None:
    model = shipped("t5-tiny")
    assert model.problems("model") == []
    blocks = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 2 * (8 * 64 * 64 + 2 * 64 * 256)
    norms, positions = 12 * 64, 2 * 32 * 4
    assert model.num_parameters() == 640 * 64 + blocks + norms + positions


def test_flops_count_every_matrix_with_the_rows_that_meet_it() -> None:
    model = replace(TINY, num_decoder_layers=3)
    source, target = 50, 30
    square, ffn = 24 * 20, 24 * 96
    rows = 2 * (4 * square + 2 * ffn) * source
    rows += 3 * (6 * square + 2 * ffn) * target + 3 * 2 * square * source
    rows += 100 * 24 * target
    attention = 2 * 12 * source**2 + 3 * (6 * target**2 + 12 * source * target)
    lengths = SampleLengths(source, target, target)
    assert model.flops_per_sample(lengths) == 6 * rows + 20 * attention


def test_problems_name_their_keys() -> None:
    bad = replace(TINY, num_decoder_layers=0, init_factor=0.0, hidden_size=0)
    keys = {line.partition(":")[0] for line in bad.problems("m")}
    assert keys == {"m.num_decoder_layers", "m.init_factor", "m.hidden_size"}
    odd = replace(
        TINY, relative_buckets=6, sites=T5Sites(query=MPOSite(in_modes=(5,), out_modes=(20,)))
    )
    keys = {line.partition(":")[0] for line in odd.problems("m")}
    assert keys == {"m.relative_buckets", "m.sites.query"}
    near = replace(TINY, relative_distance=4).problems("m")
    assert len(near) == 1
    assert near[0].startswith("m.relative_buckets: ")
    unused = replace(TINY, moe=MoEConfig(num_experts=2), sites=T5Sites(c_fc=TTMSite(rank=2)))
    assert unused.problems("m")[0].startswith("m.sites.c_fc: has no effect")
    shallow = replace(TINY, num_decoder_layers=1, moe=MoEConfig(num_experts=2, every=2))
    assert shallow.problems("m")[0].startswith("m.moe.every: ")


def test_a_wrong_size_hides_no_other_problem() -> None:
    moe = MoEConfig(
        num_experts=4, every=3, c_fc=replace(MPO_FC, in_modes=(2, 6, 3)),
        router=RouterConfig(top_k=5),
    )  # fmt: skip
    bad = replace(
        TINY, dropout=1.0, relative_buckets=6, moe=moe,
        sites=T5Sites(query=MPOSite(in_modes=(5,), out_modes=(20,)), embedding=TTMSite(rank=0)),
    )  # fmt: skip
    always = {"m.dropout", "m.moe.router.top_k"}
    for size, waiting in (
        ("vocab_size", {"m.sites.embedding"}),
        ("hidden_size", {"m.sites.embedding", "m.sites.query", "m.moe.c_fc"}),
        ("num_heads", {"m.sites.query"}),
        ("head_size", {"m.sites.query"}),
        ("ffn_size", {"m.moe.c_fc"}),
        ("relative_distance", {"m.relative_buckets"}),
        ("num_layers", {"m.moe.every"}),
        ("num_decoder_layers", {"m.moe.every"}),
    ):
        depends = {
            "m.sites.embedding", "m.sites.query", "m.moe.c_fc", "m.relative_buckets", "m.moe.every",
        }  # fmt: skip
        found = replace(bad, **{size: 0}).problems("m")  # type: ignore[arg-type]
        keys = {line.partition(":")[0] for line in found}
        assert keys == always | {f"m.{size}"} | (depends - waiting), size
