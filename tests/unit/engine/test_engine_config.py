from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from mpotrain.engine.config import DeepSpeedConfig, EngineConfig, LocalConfig, problems
from mpotrain.engine.deepspeed_json import deepspeed_json

ADAPTER: TypeAdapter[Any] = TypeAdapter(EngineConfig)


def test_union_is_tagged_by_kind() -> None:
    assert ADAPTER.validate_json('{"kind": "local", "dtype": "bf16"}') == LocalConfig(dtype="bf16")
    found = ADAPTER.validate_json('{"kind": "deepspeed", "zero_stage": 3}')
    assert found == DeepSpeedConfig(zero_stage=3)
    with pytest.raises(ValidationError):
        ADAPTER.validate_json('{"kind": "local", "zero_stage": 1}')
    with pytest.raises(ValidationError):
        ADAPTER.validate_json('{"kind": "deepspeed", "zero_stage": 4}')


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_16_bit_stage_0_alone_is_refused(stage: Any, dtype: Any) -> None:
    found = problems(DeepSpeedConfig(zero_stage=stage, dtype=dtype), 2, "engine")
    if (stage, dtype) == (0, "bf16"):
        (line,) = found
        assert line.startswith("engine.zero_stage: 0 with 16-bit weights is refused")
        assert "Adam's counter at 1 and weights already decayed" in line
    else:
        assert found == []


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, ["offload_optimizer"]),
        ({"zero_stage": 2, "offload_optimizer": True}, []),
        (
            {"zero_stage": 2, "offload_optimizer": True, "offload_parameters": True},
            ["offload_parameters"],
        ),
        ({"zero_stage": 3, "offload_parameters": True}, ["offload_parameters"]),
        ({"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}, []),
        ({"reduce_dtype": "bf16"}, ["reduce_dtype"]),
        ({"dtype": "bf16", "reduce_dtype": "bf16"}, []),
        (
            {"reduce_bucket_elements": 0, "prefetch_elements": -1, "persistence_threshold": -5},
            ["reduce_bucket_elements", "prefetch_elements", "persistence_threshold"],
        ),
    ],
)
def test_every_problem_is_named(settings: dict[str, Any], keys: list[str]) -> None:
    found = problems(DeepSpeedConfig(**settings), None, "run.engine")
    assert [line.partition(":")[0] for line in found] == [f"run.engine.{key}" for key in keys]


def test_local_engine_is_alone() -> None:
    assert problems(LocalConfig(), None, "engine") == []
    assert problems(LocalConfig(), 1, "engine") == []
    (line,) = problems(LocalConfig(), 4, "engine")
    assert line.startswith("engine.kind: the local engine runs one process")


def json_of(config: DeepSpeedConfig, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "global_batch_size": 64,
        "micro_batch_size": 4,
        "accumulation": 2,
        "on_cuda": False,
    }
    return deepspeed_json(config, **(arguments | changes))


def test_json_leaves_no_default_that_matters_to_deepspeed() -> None:
    document = json_of(DeepSpeedConfig())
    assert document["train_batch_size"] == 64
    assert document["train_micro_batch_size_per_gpu"] == 4
    assert document["gradient_accumulation_steps"] == 2
    # Absent, the clipping would be 1.0; the engine clips by itself.
    assert document["gradient_clipping"] == 0.0
    assert document["communication_data_type"] == "fp32"
    assert document["data_types"]["grad_accum_dtype"] == "fp32"
    assert document["zero_allow_untested_optimizer"] is True
    assert "optimizer" not in document
    assert "scheduler" not in document


def test_json_follows_the_section() -> None:
    section = DeepSpeedConfig(
        dtype="bf16",
        zero_stage=3,
        offload_optimizer=True,
        offload_parameters=True,
        overlap_communication=False,
        reduce_bucket_elements=11,
        gather_bucket_elements=12,
        prefetch_elements=13,
        persistence_threshold=14,
        max_live_elements=15,
        reduce_dtype="bf16",
    )
    document = json_of(section, on_cuda=True)
    zero = document["zero_optimization"]
    assert document["bf16"]["enabled"] is True
    assert document["communication_data_type"] == "bf16"
    assert zero["stage"] == 3
    assert zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] == 11
    assert zero["allgather_bucket_size"] == 12
    assert zero["stage3_prefetch_bucket_size"] == 13
    assert zero["stage3_param_persistence_threshold"] == 14
    assert zero["stage3_max_live_parameters"] == 15
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True, "ratio": 1.0}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    plain = json_of(DeepSpeedConfig(zero_stage=2))["zero_optimization"]
    assert plain["overlap_comm"] is True
    assert "offload_optimizer" not in plain
    assert json_of(DeepSpeedConfig(zero_stage=1))["zero_optimization"]["overlap_comm"] is False


def test_deepspeed_knows_every_key_of_the_json() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    zero = json_of(section)["zero_optimization"]
    for model, keys in (
        (DeepSpeedZeroConfig, zero),
        (DeepSpeedBF16Config, json_of(section)["bf16"]),
    ):
        fields = model.model_fields
        known = {*fields, *(field.alias for field in fields.values() if field.alias)}
        assert set(keys) <= known
