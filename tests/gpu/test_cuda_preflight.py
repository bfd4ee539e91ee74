"""What only a CUDA device can show of a pre-flight: the tests of GPUs and NCCL's way of failing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mpotrain.preflight.collective import all_reduce_speed
from mpotrain.preflight.gpus import damaged_memory, gpu_uuid, product_tflops, wrong_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_gpu_is_tested_and_known_by_the_name_nvidia_smi_gives_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpotrain", "preflight", "--out", str(tmp_path), "--skip", "disk"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (node,) = json.loads((tmp_path / "summary.json").read_text())["measurements"]["nodes"].values()
    assert len(node["gpus"]) == torch.cuda.device_count()
    for gpu in node["gpus"]:
        assert gpu["error"] is None
        assert 0 < gpu["free_gib"] <= gpu["total_gib"]
        assert gpu["tflops"] > 1
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    assert all(gpu["uuid"] in listed for gpu in node["gpus"])
    assert set(damaged_memory()) <= {gpu["uuid"] for gpu in node["gpus"]}
    assert node["versions"]["NVIDIA driver"] != "absent"
    assert node["versions"]["NCCL"] != "absent"


def test_a_wrong_element_is_seen_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    assert wrong_product(device) is None
    assert product_tflops(device) > 1
    assert gpu_uuid(device)[:4] in ("GPU-", "MIG-")
    matmul = torch.Tensor.__matmul__

    def broken(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = matmul(left, right)
        if left.is_cuda:
            product[7, 7] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert wrong_product(device) is not None


def test_an_all_reduce_without_partner_comes_back_with_an_error() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):
        all_reduce_speed(store, 0, 2, torch.device("cuda", 0), 5.0, 2**20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_sum_over_nccl(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "mpotrain", "preflight", "--out", str(tmp_path), "--skip", "disk"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (group,) = json.loads((tmp_path / "summary.json").read_text())["measurements"]["inside"]
    assert group["gib_per_s"] > 1
