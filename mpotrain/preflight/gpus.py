"""Do the GPUs of this rank exist, have memory, compute right, and report no damaged memory?"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable

import torch

from mpotrain.errors import ParallelError
from mpotrain.parallel.environment import Ranks
from mpotrain.parallel.ranks import resolve_device
from mpotrain.preflight.facts import GpuFacts

ROWS = 4096
DEPTH = 128
"""Sums of this many products of -1, 0 and 1 are whole numbers that bf16 holds exactly."""
ROUNDS = 20
SMI_SECONDS = 20.0
GIB = 2**30


def rank_device(ranks: Ranks, device: str) -> torch.device:
    """Return where this rank would train.

    Args:
        ranks: place of this process.
        device: "auto", "cpu" or "cuda".

    Raises:
        ParallelError: CUDA was asked for and is missing, or there are more ranks than devices.
    """
    return resolve_device(device, ranks.local_rank)


def check_gpus(ranks: Ranks, device: str) -> tuple[str | None, tuple[GpuFacts, ...], list[str]]:
    """Test every GPU that falls to this rank: its own, and those that no rank of the node has.

    Args:
        ranks: place of this process.
        device: "auto", "cpu" or "cuda".

    Returns:
        Identity of this rank's own GPU (None on a CPU), the tested GPUs, and what is wrong apart
        from them.
    """
    try:
        own = rank_device(ranks, device)
    except ParallelError as raised:
        return None, (), [str(raised).removeprefix("engine.device: ")]
    if own.type == "cpu":
        error = wrong_product(own, 256)
        return None, (), [] if error is None else [f"the CPU computes wrongly: {error}"]
    count = torch.cuda.device_count()
    mine = range(ranks.local_rank, count, ranks.local_size) if count > 1 else range(1)
    damage = damaged_memory()
    facts = tuple(_test(torch.device("cuda", index), damage) for index in mine)
    return gpu_uuid(own), facts, []


def gpu_uuid(device: torch.device) -> str:
    """Return the identity of a GPU as nvidia-smi prints it."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def wrong_product(device: torch.device, rows: int = ROWS) -> str | None:
    """Multiply matrices whose product is known exactly, in fp32 and bf16.

    Args:
        device: where.
        rows: rows of the left and columns of the right matrix.

    Returns:
        What is wrong; None if every element is right.
    """
    # The values are small whole numbers, so every order of summation and every precision of the
    # tensor cores gives the same bits. Rows repeat, so the exact product is cheap to know.
    index = torch.arange(rows * DEPTH, dtype=torch.int64)
    left = (((index * 7919 + index // DEPTH) % 3) - 1).view(rows, DEPTH)
    right = (((index * 104729 + index // rows) % 3) - 1).view(DEPTH, rows)
    exact = left.float() @ right.float()
    for dtype in (torch.float32, torch.bfloat16):
        product = (left.to(device, dtype) @ right.to(device, dtype)).cpu().float()
        num_wrong = int((product != exact).sum())
        if num_wrong:
            name = str(dtype).removeprefix("torch.")
            return f"{num_wrong} of {rows * rows} elements of a {name} matrix product are wrong"
    return None


def product_tflops(device: torch.device, rows: int = ROWS) -> float:
    """Return the speed of bf16 matrix products, in 10^12 operations per second.

    Args:
        device: a GPU.
        rows: rows and columns of the matrices.
    """
    left = torch.randn(rows, rows, device=device, dtype=torch.bfloat16)
    right = torch.randn(rows, rows, device=device, dtype=torch.bfloat16)
    torch.mm(left, right)
    torch.cuda.synchronize(device)
    start = time.monotonic()
    for _ in range(ROUNDS):
        torch.mm(left, right)
    torch.cuda.synchronize(device)
    return ROUNDS * 2 * rows**3 / (time.monotonic() - start) / 1e12


def damaged_memory(run: Callable[[list[str]], str | None] | None = None) -> dict[str, str]:
    """Return what nvidia-smi says of damaged GPU memory, by uuid; empty without nvidia-smi.

    Args:
        run: runs a command and returns its output, or None; for tests.
    """
    run = _output_of if run is None else run
    found: dict[str, str] = {}
    ecc = run(_query("--query-gpu=uuid,ecc.errors.uncorrected.volatile.total"))
    for uuid, errors in _rows(ecc, 2):
        if errors.isdigit() and int(errors):
            found[uuid] = f"{errors} uncorrectable memory (ECC) errors since its last reset"
    remapped = run(_query("--query-remapped-rows=gpu_uuid,remapped_rows.failure"))
    for uuid, failed in _rows(remapped, 2):
        if failed.lower() in ("1", "yes"):
            found[uuid] = "a damaged row of its memory could not be replaced (row remapping)"
    return found


def _test(device: torch.device, damage: dict[str, str]) -> GpuFacts:
    facts = torch.cuda.get_device_properties(device)
    uuid = gpu_uuid(device)
    total, free, tflops = facts.total_memory / GIB, 0.0, None
    try:
        # Before this process itself takes memory for its products.
        free = torch.cuda.mem_get_info(device)[0] / GIB
        error = wrong_product(device)
        tflops = product_tflops(device)
    except RuntimeError as raised:
        error = str(raised).strip().splitlines()[0]
    finally:
        torch.cuda.empty_cache()
    return GpuFacts(uuid, facts.name, total, free, tflops, error or damage.get(uuid))


def _query(fields: str) -> list[str]:
    return ["nvidia-smi", fields, "--format=csv,noheader,nounits"]


def _output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=SMI_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _rows(text: str | None, columns: int) -> Iterable[list[str]]:
    for line in (text or "").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == columns:
            yield cells
