"""The flight recorder: switched on in time, read back, and timeouts of all process groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mpotrain.parallel.flight import keep_collectives, waiting_collectives

REPOSITORY = Path(__file__).resolve().parents[3]

PROGRAM = """
import json, os, time
from datetime import timedelta
from mpotrain.parallel.flight import keep_collectives, recorded_collectives, waiting_collectives
keep_collectives(os.environ)
import torch
import torch.distributed as dist
from mpotrain.parallel.ranks import close_world, init_world, set_collective_timeout
world = init_world("deepspeed", "cpu", timeout=timedelta(minutes=7))
group = dist.new_group([0], group_desc="own")
dist.all_reduce(torch.ones(3), group=group)
set_collective_timeout(world, timedelta(minutes=7))
dist.all_reduce(torch.ones(3), group=group)
dist.all_reduce(torch.ones(2, 5))
end = time.monotonic() + 60
while waiting_collectives(recorded := recorded_collectives()) and time.monotonic() < end:
    time.sleep(0.05)  # an operation is retired a moment after it has ended
print(json.dumps([recorded, waiting_collectives(recorded)]))
close_world(world)
"""


def test_collectives_are_recorded_and_all_groups_get_the_timeout() -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True,
        env=kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    recorded, waiting = json.loads(done.stdout)
    assert waiting == []
    entries = [
        (entry["process_group"][1], entry["input_sizes"], entry["timeout_ms"])
        for entry in recorded["other"]["entries"]
        if "all_reduce" in entry["profiling_name"]
    ]
    assert entries == [
        ("own", [[3]], 30 * 60_000),
        ("own", [[3]], 7 * 60_000),
        ("default_pg", [[2, 5]], 7 * 60_000),
    ]


def test_a_choice_in_the_environment_stands() -> None:
    for key in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        environ = {key: "5"}
        keep_collectives(environ)
        assert environ == {key: "5"}
    environ = {}
    keep_collectives(environ)
    assert environ == {"TORCH_FR_BUFFER_SIZE": "2000"}


def test_only_what_has_not_ended_is_waited_for() -> None:
    entry = {
        "profiling_name": "gloo:all_reduce",
        "collective_seq_id": 17,
        "process_group": ["0", "default_pg"],
        "input_dtypes": ["Float"],
        "input_sizes": [[3, 4]],
        "time_created_ns": 10_000_000_000,
        "retired": False,
    }
    recorded = {
        "nccl": {"error": "RuntimeError: none"},
        "other": {"entries": [entry | {"retired": True}, entry]},
    }
    assert waiting_collectives(recorded, now=72.5) == [
        "gloo:all_reduce number 17 of group 0 (default_pg), Float [3, 4], for 62.5 s"
    ]
    odd = {"other": {"entries": [{"retired": False, "time_created_ns": 0}]}}
    assert waiting_collectives(odd, now=1.0) == [
        "collective number ? of group ? (?), no tensor, for 1.0 s"
    ]
