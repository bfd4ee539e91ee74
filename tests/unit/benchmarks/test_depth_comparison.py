"""The comparison of deep encoders: what is compared, and what the figures say."""

import math

import pytest

from benchmarks import depth
from benchmarks.comparison import Comparison, comparison_parser
from benchmarks.depth import RUN_FILE, VARIANTS
from benchmarks.depth_results import Figures, markdown_table, summarise
from mpotrain.config import load_config
from mpotrain.models.encoder_config import BLOCK_NORMS, EncoderConfig

RUNS = {name: load_config(RUN_FILE, overrides) for name, overrides in VARIANTS.items()}


def model(name: str) -> EncoderConfig:
    found = RUNS[name].model
    assert isinstance(found, EncoderConfig)
    return found


def test_variants_differ_in_what_they_share() -> None:
    scopes = {name: model(name).sharing.scope for name in VARIANTS}
    assert (scopes["all-shared"], scopes["untied"]) == ("all", "none")
    assert {scopes[name] for name in ("central-shared", "deep-stable")} == {"central"}
    sizes = {name: model(name).num_parameters() for name in VARIANTS}
    order = ["all-shared", "central-shared", "central-shared-adapters", "untied"]
    assert sorted(order, key=sizes.__getitem__) == order
    assert {model(name).num_layers for name in order} == {24}


def test_the_deep_pair_differs_in_the_scaling_alone() -> None:
    stable, unscaled = VARIANTS["deep-stable"], VARIANTS["deep-unscaled"]
    assert set(stable) - set(unscaled) == {depth.STABLE}
    assert set(unscaled) <= set(stable)
    assert (model("deep-stable").num_layers, model("deep-stable").norm) == (48, "post")


def test_a_layer_more_costs_its_auxiliaries_and_vectors() -> None:
    per_layer = 6_336 + len(BLOCK_NORMS) * 2 * 64 + 5 * 64 + 256
    more = load_config(RUN_FILE, [*VARIANTS["central-shared"], "model.num_layers=25"]).model
    assert more.num_parameters() - model("central-shared").num_parameters() == per_layer


def figures(variant: str, seed: int, loss: float) -> Figures:
    curve = [(1, 5.0, 0.5), (2, 4.5, 3.0 * seed)]
    return Figures(variant, seed, 24, 1000, 600, loss, 0.25, seed, 0.1 * seed, curve)


def test_figures_are_summed_up_over_seeds() -> None:
    one, two = summarise([figures("a", 1, 4.0), figures("b", 1, 5.0), figures("a", 2, 4.2)])
    assert (one.variant, one.num_seeds, one.num_skipped) == ("a", 2, 3)
    assert one.loss == pytest.approx(4.1)
    assert one.loss_std == pytest.approx(0.1 * math.sqrt(2))
    assert one.largest_norm == pytest.approx(6.0)
    assert math.isnan(two.loss_std)
    rows = markdown_table([one, two]).splitlines()
    assert rows[2].startswith("| a | 24 | 1,000 | 600 | 4.1000 ± 0.1414 | 25.0 % | 6.00 |")
    assert "±" not in rows[3]


def test_deep_runs_have_one_seed(tmp_path) -> None:
    parser = comparison_parser("x", VARIANTS, vocab_size=512, steps=200, title="x")
    options = parser.parse_args(["--out", str(tmp_path)])
    deep = frozenset({"deep-stable"})
    runs = Comparison("x", RUN_FILE, VARIANTS, lambda *_: None, deep)._runs(options)
    seeds = [(run.variant, run.seed) for run in runs]
    assert seeds.count(("deep-stable", 1)) == 1
    assert ("deep-stable", 2) not in seeds
    assert ("deep-unscaled", 3) in seeds
    assert all(run.config.model.vocab_size == 515 for run in runs)
