"""What is impossible between mixtures, engines, degrees and masks, said before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpotrain.config import RunConfig, load_config
from mpotrain.engine.config import DeepSpeedConfig, LocalConfig, expert_problems
from mpotrain.errors import ConfigError

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"


def run_of(name: str, *overrides: str) -> RunConfig:
    return load_config(RUNS / f"{name}.toml", overrides)


@pytest.mark.parametrize(
    ("engine", "ranks", "experts", "words"),
    [
        (
            DeepSpeedConfig(),
            3,
            8,
            "parallel.expert: 3 ranks do not divide the 8.*1, 2, 4, 8",
        ),
        (DeepSpeedConfig(), 2, None, "parallel.expert: 2, but the model has no mixture"),
        (LocalConfig(), 2, 8, "parallel.expert: 2, but the local engine runs one process"),
        (DeepSpeedConfig(zero_stage=0), 2, 8, "engine.zero_stage 0 is refused"),
        (DeepSpeedConfig(zero_stage=3), 2, 8, "engine.zero_stage 3 is refused"),
    ],
)
def test_impossible_combinations(
    engine: LocalConfig | DeepSpeedConfig, ranks: int, experts: int | None, words: str
) -> None:
    (line,) = expert_problems(engine, ranks, experts)

    assert re.search(words, line)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicated_experts_run_in_every_stage(stage: int) -> None:
    assert expert_problems(DeepSpeedConfig(zero_stage=stage), 1, 8) == []  # type: ignore[arg-type]
    assert expert_problems(LocalConfig(), 1, 8) == []
    assert expert_problems(DeepSpeedConfig(zero_stage=3), 1, None) == []


def test_world_that_the_degree_does_not_divide() -> None:
    run = run_of("gpt2-small-mpoe8", "parallel.expert=4")
    assert run.problems(8) == []
    (line,) = [line for line in run.problems(6) if line.startswith("parallel.expert")]
    # 3 and 6 divide the world, but not the 8 experts.
    assert line.endswith("4 ranks do not divide the world of 6; possible: 1, 2")


@pytest.mark.parametrize("degree", [0, -1])
def test_degrees_below_one_are_refused_by_name(degree: int) -> None:
    with pytest.raises(ConfigError, match=f"parallel.expert: {degree} ranks; give at least 1"):
        run_of("gpt2-small-mpoe8", f"parallel.expert={degree}")


def test_run_file_names_every_mistake_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(
            "gpt2-small-mpoe8",
            "parallel.expert=3",
            "engine.zero_stage=3",
            "train.central_mask.probability=1.5",
            "model.moe.router.top_k=9",
        )
    text = str(caught.value)
    for words in (
        "parallel.expert: 3 ranks do not divide",
        "engine.zero_stage 3 is refused",
        "train.central_mask.probability: must be in [0, 1]",
        "model.moe.router.top_k: 9 of 8 experts",
    ):
        assert words in text


def test_mask_without_a_central_tensor_is_refused() -> None:
    with pytest.raises(ConfigError, match="no site of the model has a central tensor"):
        run_of("gpt2-small-dense", "train.central_mask.probability=0.5")
    assert run_of("gpt2-small-ttm16", "train.central_mask.probability=0.5").problems() == []
