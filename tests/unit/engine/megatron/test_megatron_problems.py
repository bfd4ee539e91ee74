"""Every refused mix of the Megatron engine, and that the nearest choice it names is accepted."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpotrain.config import RunConfig, load_config
from mpotrain.engine.config import (
    CentralMaskConfig,
    DeepSpeedConfig,
    LocalConfig,
    uncut_problems,
)
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.errors import ConfigError
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.parallel.plan import ParallelConfig, batch_problems

RUNS = Path(__file__).resolve().parents[4] / "configs" / "runs"
MEGATRON = MegatronConfig()


def run(name: str, *, engine: Any = MEGATRON, **parallel: Any) -> RunConfig:
    """Return a shipped run on this engine; its own degrees are dropped."""
    return replace(
        load_config(RUNS / f"{name}.toml"), engine=engine, parallel=ParallelConfig(**parallel)
    )


def gpt(**parallel: Any) -> RunConfig:
    """GPT-2 small: 12 heads, 12 layers, sequences of 512, 16 samples in micro-batches of 2."""
    return run("gpt2-small-dense", **parallel)


def moe(**parallel: Any) -> RunConfig:
    """GPT-2 small with 8 experts."""
    return run("gpt2-small-mpoe8", **parallel)


def t5(**parallel: Any) -> RunConfig:
    """T5 base: 512 tokens of source, 114 targets."""
    return run("t5-base", **parallel)


def with_train(config: RunConfig, **sizes: int) -> RunConfig:
    return replace(config, train=replace(config.train, **sizes))


def with_model(config: RunConfig, **fields: Any) -> RunConfig:
    return replace(config, model=replace(config.model, **fields))


def with_length(config: RunConfig, length: int) -> RunConfig:
    return replace(config, data=replace(config.data, sequence_length=length))


def only(config: RunConfig, world: int | None = None) -> str:
    """Return the one line that a run is refused with."""
    (line,) = config.problems(world)
    return line


def named(line: str, key: str) -> list[int]:
    """Return the values that a line names for a key: `key=3 or 4`."""
    found = re.search(rf"{re.escape(key)}=(\d+)(?: or (\d+))?", line)
    assert found, line
    return [int(number) for number in found.groups() if number is not None]


@pytest.mark.parametrize("name", ["gpt2-small-dense", "gpt2-small-mpoe8", "mpobert-48", "t5-base"])
def test_uncut_runs_have_no_problems(name: str) -> None:
    engine = MegatronConfig(distributed_optimizer=False)
    assert run(name, engine=engine).problems(1) == []
    assert run(name, engine=engine).problems(4) == []


@pytest.mark.parametrize("path", sorted(RUNS.glob("*-megatron.toml")), ids=lambda path: path.stem)
def test_shipped_runs_of_this_engine_fit_the_world_that_they_name(path: Path) -> None:
    config = load_config(path)
    assert config.parallel.data is not None
    world = config.parallel.data * config.parallel.model_ranks
    assert f"--nproc-per-node {world} " in path.read_text()
    assert config.problems(world) == []
    assert config.problems(world // 2) != []


def test_heads() -> None:
    line = only(gpt(tensor=8))
    assert line.startswith("parallel.tensor: 8 ranks do not divide the 12 heads (model.num_heads)")
    assert named(line, "parallel.tensor") == [6, 12]
    for degree in (6, 12):
        assert gpt(tensor=degree).problems() == []


def test_features() -> None:
    config = gpt(tensor=2)
    sites = replace(config.model.sites, c_fc=MPOSite(in_modes=(24, 32), out_modes=(55, 57)))
    line = only(with_model(config, sites=sites))
    assert line.startswith("model.sites.c_fc: its out modes [55, 57] multiply to 3135")
    assert with_model(gpt(tensor=1), sites=sites).problems() == []


@pytest.mark.parametrize("tensor", [1, 2])
def test_tensorized_embedding(tensor: int) -> None:
    config = gpt(tensor=tensor)
    sites = replace(config.model.sites, embedding=TTMSite(rank=64))
    line = only(with_model(config, sites=sites))
    assert line.startswith('model.sites.embedding: "ttm"')
    other = replace(with_model(config, sites=sites), engine=DeepSpeedConfig())
    assert replace(other, parallel=ParallelConfig()).problems() == []


@pytest.mark.parametrize(
    ("degrees", "key", "choices"),
    [
        ({"pipeline": 5}, "parallel.pipeline", [4, 6]),
        ({"pipeline": 24}, "parallel.pipeline", [12]),
        ({"pipeline": 5, "virtual_pipeline": 3}, "parallel.pipeline", [4]),
        ({"pipeline": 2, "virtual_pipeline": 4}, "parallel.virtual_pipeline", [3, 6]),
    ],
)
def test_layers(degrees: dict[str, int], key: str, choices: list[int]) -> None:
    line = only(gpt(**degrees))
    assert line.startswith(f"{key}: ")
    assert "the 12 layers (model.num_layers)" in line
    assert named(line, key) == choices
    for choice in choices:
        assert gpt(**degrees | {key.partition(".")[2]: choice}).problems() == []


def test_chunks_that_no_number_of_stages_allows() -> None:
    line = only(gpt(pipeline=5, virtual_pipeline=7))
    assert line.endswith("use parallel.pipeline=4 or 6 and parallel.virtual_pipeline=1")
    assert gpt(pipeline=6).problems() == []


def test_chunks_need_stages() -> None:
    line = only(gpt(virtual_pipeline=2))
    assert line.startswith("parallel.virtual_pipeline: 2 chunks on each stage, but there is one")
    assert named(line, "parallel.virtual_pipeline") == [1]
    assert gpt(virtual_pipeline=2, pipeline=named(line, "parallel.pipeline")[0]).problems() == []


def test_interleaved_micro_batches_go_round_in_groups() -> None:
    degrees = {"pipeline": 3, "virtual_pipeline": 2}
    line = only(gpt(**degrees), 3)  # 16 samples are 8 micro-batches, 3 stages
    assert line.startswith("train.global_batch_size: 16 sequences are 8 micro-batches")
    assert named(line, "train.global_batch_size") == [12, 18]
    for size in (12, 18):
        assert with_train(gpt(**degrees), global_batch_size=size).problems(3) == []
    assert gpt(pipeline=3).problems(3) == []
    assert gpt(**degrees).problems() == []  # without a world nothing is known of it


@pytest.mark.parametrize(
    ("degrees", "length", "unit", "choices"),
    [
        ({"tensor": 4, "sequence": True}, 510, 4, [508, 512]),
        ({"context": 2}, 510, 4, [508, 512]),
        ({"context": 3}, 512, 6, [510, 516]),
        ({"tensor": 4, "sequence": True, "context": 2}, 500, 8, [496, 504]),
        ({"tensor": 2, "sequence": True, "context": 3}, 512, 6, [510, 516]),
        ({"tensor": 3, "sequence": True}, 1024, 3, [1023]),  # there are no more positions
    ],
)
def test_lengths(degrees: dict[str, Any], length: int, unit: int, choices: list[int]) -> None:
    line = only(with_length(gpt(**degrees), length))
    assert line.startswith(f"data.sequence_length: {length} makes {length} inputs, no multiple of")
    assert f"no multiple of {unit}, which" in line
    assert named(line, "data.sequence_length") == choices
    for choice in choices:
        assert with_length(gpt(**degrees), choice).problems() == []
    assert with_length(gpt(tensor=2), 511).problems() == []


def test_lengths_of_source_and_targets() -> None:
    line = only(t5(tensor=4, sequence=True))
    assert line.startswith("data.sequence_length: 512 makes 114 targets, no multiple of 4")
    for choice in named(line, "data.sequence_length"):
        lengths = t5().data.objective.lengths(choice)
        assert (lengths.inputs % 4, lengths.targets % 4) == (0, 0)
        assert with_length(t5(tensor=4, sequence=True), choice).problems() == []
    assert line.endswith("or parallel.sequence=false")
    assert t5(tensor=4).problems() == []
    assert t5(tensor=2, sequence=True).problems() == []


def test_positions_without_ranks_to_share_them() -> None:
    assert only(gpt(sequence=True)).startswith("parallel.sequence: true, but parallel.tensor is 1")
    assert gpt(sequence=True, tensor=2).problems() == []


def test_mixtures_with_tensor_ranks_need_split_positions() -> None:
    line = only(moe(tensor=2))
    assert line.startswith("parallel.sequence: false, but with parallel.tensor=2")
    assert moe(tensor=2, sequence=True).problems() == []
    assert moe(tensor=1).problems() == []


@pytest.mark.parametrize("key", ["expert", "expert_tensor"])
def test_degrees_of_experts_without_a_mixture(key: str) -> None:
    tensor = {"tensor": 2, "sequence": True}
    line = only(gpt(**tensor, **{key: 2}))
    assert line.startswith(f"parallel.{key}: 2, but the model has no mixture of experts")
    assert gpt(**tensor, **{key: named(line, f"parallel.{key}")[0]}).problems() == []


def test_experts_over_ranks() -> None:
    line = only(moe(expert=3))
    assert line.startswith("parallel.expert: 3 ranks do not divide the 8 experts")
    assert named(line, "parallel.expert") == [2, 4]
    for ranks in (2, 4):
        assert moe(expert=ranks).problems() == []


@pytest.mark.parametrize(("tensor", "asked", "choices"), [(4, 2, "1 or 4"), (1, 2, "1")])
def test_ranks_that_share_an_expert(tensor: int, asked: int, choices: str) -> None:
    degrees = {"tensor": tensor, "sequence": tensor > 1}
    line = only(moe(**degrees, expert_tensor=asked))
    assert line.startswith(f"parallel.expert_tensor: {asked}, but the ranks that share an expert")
    assert line.endswith(f"use parallel.expert_tensor={choices}")
    for choice in choices.split(" or "):
        assert moe(**degrees, expert_tensor=int(choice)).problems() == []


@pytest.mark.parametrize("key", ["capacity_factor", "eval_capacity_factor"])
@pytest.mark.parametrize("splits", [{"tensor": 2, "sequence": True}, {"context": 2}])
def test_capacity_where_no_rank_sees_the_micro_batch(key: str, splits: dict[str, Any]) -> None:
    def full(**degrees: Any) -> RunConfig:
        config = moe(**degrees)
        assert config.model.moe is not None
        router = replace(config.model.moe.router, **{key: 1.25})
        return with_model(config, moe=replace(config.model.moe, router=router))

    line = only(full(**splits))
    assert line.startswith(f"model.moe.router.{key}: which tokens are dropped")
    assert f"parallel.{'sequence' if 'tensor' in splits else 'context'}" in line
    assert full(pipeline=2, expert=4).problems() == []
    assert moe(**splits).problems() == []


def test_t5_in_stages_and_over_cut_sequences() -> None:
    assert only(t5(pipeline=2)).startswith("parallel.pipeline: 2, but the schedules of megatron-")
    assert only(t5(context=2)).startswith("parallel.context: 2, but the decoder of T5")
    assert only(t5(virtual_pipeline=2)).startswith("parallel.virtual_pipeline: 2 chunks")
    for key in ("pipeline", "context", "virtual_pipeline"):
        assert named(only(t5(**{key: 2})), f"parallel.{key}") == [1]


def test_world_and_dense_degrees() -> None:
    line = only(gpt(tensor=2, pipeline=3), 8)
    assert line.startswith("parallel.tensor: tensor 2 x context 1 x pipeline 3 = 6 ranks")
    assert line.endswith("they do not divide the world of 8; start 6 or 12 processes")
    config = with_train(gpt(tensor=2, pipeline=3), global_batch_size=24)
    assert config.problems(6) == []
    assert config.problems(12) == []
    assert only(gpt(tensor=4, pipeline=2), 4).endswith("start 8 processes")


def test_world_and_experts() -> None:
    line = only(moe(expert=8), 4)
    assert line.startswith("parallel.expert: expert 8 x expert_tensor 1 x pipeline 1 = 8 ranks")
    assert "start 8 processes" in line
    assert named(line, "parallel.expert") == [4]
    assert moe(expert=4).problems(4) == []
    assert moe(expert=8).problems(8) == []
    # Experts lie on tensor-parallel ranks, too: the data ranks need not be a multiple.
    assert moe(expert=8, tensor=4, sequence=True).problems(8) == []
    line = only(moe(expert=8, tensor=4, sequence=True, expert_tensor=4), 8)
    assert named(line, "parallel.expert") == [2]
    assert moe(expert=2, tensor=4, sequence=True, expert_tensor=4).problems(8) == []


def test_global_batch_and_data_ranks() -> None:
    degrees = {"tensor": 2, "pipeline": 2}
    assert gpt(**degrees).problems(8) == []
    line = only(gpt(**degrees), 24)
    assert line.startswith("train.global_batch_size: 16 sequences cannot be cut")
    assert "on 6 data-parallel ranks" in line
    assert "4 or 8 data-parallel ranks" in line
    assert gpt(**degrees).problems(16) == []
    assert gpt(**degrees).problems(32) == []


def test_expected_data_ranks() -> None:
    parallel = ParallelConfig(data=4, tensor=2)
    (line,) = batch_problems(16, 2, 4, parallel)
    assert line == (
        "parallel.data: 4 ranks are expected, but the world has 2 data-parallel ranks in 4; start "
        "8 processes, or change parallel.data to 2"
    )
    assert batch_problems(16, 2, 8, parallel) == []
    # Which degree does not divide the world is the engine's to say, once.
    assert batch_problems(16, 2, 7, parallel) == []


@pytest.mark.parametrize("given", [set(), {"distributed_optimizer"}, {"overlap_grad_reduce"}])
def test_overlapped_gathering(given: set[str]) -> None:
    both = ("distributed_optimizer", "overlap_grad_reduce")
    fields = {key: key in given for key in both}
    engine = MegatronConfig(overlap_param_gather=True, **fields)
    line = only(replace(gpt(), engine=engine))
    assert line.startswith("engine.overlap_param_gather: ")
    asked = re.findall(r"engine\.(\w+)=true", line)
    assert set(asked) == set(both) - given
    assert replace(gpt(), engine=replace(engine, **dict.fromkeys(asked, True))).problems() == []
    off = replace(engine, overlap_param_gather=False)
    assert replace(gpt(), engine=off).problems() == []


def test_buckets() -> None:
    line = only(replace(gpt(), engine=MegatronConfig(bucket_elements=0)))
    assert line.startswith("engine.bucket_elements: 0; it must be at least 1")
    assert replace(gpt(), engine=MegatronConfig(bucket_elements=1)).problems() == []


def test_lamb_takes_norms_of_whole_layers() -> None:
    assert only(run("mpobert-48")).startswith("engine.distributed_optimizer: true, but LAMB")
    assert run("mpobert-48", engine=MegatronConfig(distributed_optimizer=False)).problems() == []


def test_masked_elements_and_virtual_stages() -> None:
    def masked(granularity: Any, **parallel: Any) -> RunConfig:
        config = run("gpt2-small-ttm64", **parallel)
        mask = CentralMaskConfig(probability=0.5, granularity=granularity)
        return replace(config, train=replace(config.train, central_mask=mask))

    line = only(masked("element", pipeline=2, virtual_pipeline=2))
    assert line.startswith("train.central_mask.granularity: ")
    assert 'granularity="tensor"' in line
    assert masked("tensor", pipeline=2, virtual_pipeline=2).problems() == []
    assert masked("element", pipeline=2).problems() == []


@pytest.mark.parametrize("engine", [LocalConfig(), DeepSpeedConfig()])
@pytest.mark.parametrize(
    ("key", "value", "without"),
    [
        ("tensor", 2, "1"),
        ("pipeline", 2, "1"),
        ("virtual_pipeline", 2, "1"),
        ("context", 2, "1"),
        ("expert_tensor", 2, "1"),
        ("sequence", True, "false"),
    ],
)
def test_engines_that_cut_nothing(engine: Any, key: str, value: Any, without: str) -> None:
    parallel = ParallelConfig(**{key: value})
    (line,) = uncut_problems(engine, parallel)
    assert line.startswith(f"parallel.{key}: {str(value).lower()}, but the {engine.kind} engine")
    assert line.endswith(f'use engine.kind="megatron", or parallel.{key}={without}')
    assert line in replace(gpt(), engine=engine, parallel=parallel).problems()
    assert uncut_problems(engine, ParallelConfig(expert=4)) == []
    assert uncut_problems(MEGATRON, parallel) == []


def test_several_problems_come_at_once() -> None:
    lines = with_length(moe(tensor=5, pipeline=5, expert=3, context=2), 510).problems()
    keys = [line.partition(":")[0] for line in lines]
    assert keys == [
        "parallel.tensor",
        "parallel.pipeline",
        "data.sequence_length",
        "parallel.sequence",
        "parallel.expert",
    ]


def test_sizes_that_are_wrong_in_themselves_are_said_once() -> None:
    lines = with_model(gpt(tensor=2, pipeline=2), num_layers=0).problems()
    assert lines == ["model.num_layers: must be at least 1, is 0"]
    lines = gpt(tensor=0, pipeline=2).problems(4)
    assert lines == ["parallel.tensor: 0 ranks; give at least 1"]


def test_fine_tuning_refuses_this_engine(tmp_path: Path) -> None:
    from mpotrain.tune.config import load_tune_config

    path = RUNS.parent / "tune" / "mpobert-12-mnli.toml"
    with pytest.raises(ConfigError, match=r'engine\.kind: "megatron", but that engine cuts'):
        load_tune_config(path, ['engine={kind="megatron"}'])
    with pytest.raises(ConfigError, match=r"parallel\.tensor: 2, but the deepspeed engine"):
        load_tune_config(path, ["parallel.tensor=2"])
