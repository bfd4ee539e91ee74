"""One tensorized layer against nn.Linear and other implementations: time, memory, plan accuracy.

Run it with ``python -m benchmarks.layer [--quick] [--out FILE]``. Every candidate computes the same
function of the same cores (checked before timing), forward and backward:

* planned: `mpotrain.tensor.contract.linear` with its plan;
* planned, W kept: the same, keeping W for backward;
* best chain: the best plan that does not materialise, to see whether plans choose well;
* tltorch reconstructed / factorized: tensorly-torch's FactorizedLinear ("blocktt");
* naive chain: the input contracted with one core after the other by einsum, under autograd.

Chains whose predicted time (or, for the naive one, whose FLOPs) is above ``--limit`` times dense
are left out. Candidates far slower than nn.Linear are timed in fewer rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measure import environment, interleaved, peak_bytes, saved_bytes
from mpotrain.tensor.contract import linear, rebuild
from mpotrain.tensor.device import DeviceProfile, DType
from mpotrain.tensor.init import init_cores
from mpotrain.tensor.plan import PROFILES, ContractionPlan, plan_contraction
from mpotrain.tensor.spec import MPOSpec, mpo_spec, ttm_spec

BASELINE = "nn.Linear"
_MOST_TRANSIENT = 2 << 30
TORCH_DTYPES: dict[DType, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

Forward = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One implementation.

    Attributes:
        parameters: what is trained.
        forward: x and the parameters to y.
        predicted: time relative to dense that the plan predicts; None for other libraries.
        transient: predicted peak of short-lived bytes, likewise.
    """

    parameters: list[Tensor]
    forward: Forward
    predicted: float | None = None
    transient: int | None = None


@dataclass(frozen=True)
class Row:
    """Results of one candidate at one shape (times relative to nn.Linear of the same round)."""

    layer: str
    dtype: str
    tokens: int
    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    peak_bytes: int
    peak_ratio: float
    saved_bytes: int
    predicted: float | None
    predicted_transient_bytes: int | None
    plan: str | None


def layers(quick: bool) -> dict[str, MPOSpec]:
    """Return the shapes: the published TTM GPT-2 layers and full-bond MPO with five cores."""
    ranks = (16, 64) if quick else (16, 32, 64, 80)
    sizes = ((768, 3072),) if quick else ((768, 3072), (3072, 768))
    shapes: dict[str, MPOSpec] = {}
    for rank in ranks:
        for rows, columns in sizes:
            shapes[f"TTM-{rank} {rows}x{columns}"] = ttm_spec(rows, columns, rank)
    if not quick:
        shapes["TTM-72 1024x4096"] = ttm_spec(1024, 4096, 72)
        shapes["two cores r=4 1024x4096"] = mpo_spec(1024, 4096, (32, 32), (64, 64), cap=4)
    shapes["MPO5 full bonds 768x3072"] = mpo_spec(768, 3072, (3, 4, 4, 4, 4), (4, 4, 8, 6, 4))
    return shapes


def naive_chain(spec: MPOSpec) -> Forward:
    """Return the textbook chain: one einsum for each core, everything kept by autograd."""

    def forward(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        padded = functional.pad(x, (0, spec.padded_in - spec.in_features))
        state = padded[:, None, None, :]  # (tokens, j_1..j_k, d_k, i_{k+1}..i_n)
        for core in cores:
            apart = state.reshape(*state.shape[:3], core.shape[1], -1)
            state = torch.einsum("bJair,aijc->bJjcr", apart, core.to(x.dtype)).flatten(1, 2)
        return state.reshape(len(x), -1)[:, : spec.out_features]

    return forward


def tltorch_candidate(
    spec: MPOSpec, cores: Sequence[Tensor], dtype: torch.dtype, implementation: str
) -> Candidate | None:
    """Return tensorly-torch's layer with our cores, or None where it is not installed."""
    try:
        from tltorch import FactorizedLinear
    except ImportError:
        return None
    layer = FactorizedLinear(
        in_tensorized_features=spec.in_modes,
        out_tensorized_features=spec.out_modes,
        bias=False,
        factorization="blocktt",
        rank=spec.all_bonds,
        implementation=implementation,
    ).to(cores[0].device, dtype)
    parameters = list(layer.parameters())
    for parameter, core in zip(parameters, cores, strict=True):
        parameter.data.copy_(core.transpose(1, 2))
    return Candidate(parameters, lambda x, _: layer(x))


def candidates(
    spec: MPOSpec,
    tokens: int,
    dtype: DType,
    profile: DeviceProfile,
    device: torch.device,
    limit: float,
) -> dict[str, Candidate]:
    """Return all implementations of one layer, with equal weights."""
    generator = torch.Generator().manual_seed(0)
    cores = init_cores(spec, 0.02, generator=generator, device=device)
    weight = rebuild(cores, spec).t().to(TORCH_DTYPES[dtype]).contiguous()
    found: dict[str, Candidate] = {
        BASELINE: Candidate(
            [nn.Parameter(weight)], lambda x, parameters: functional.linear(x, parameters[0])
        )
    }

    def ours(plan: ContractionPlan) -> Candidate:
        return Candidate(
            [nn.Parameter(core.clone()) for core in cores],
            lambda x, parameters: linear(x, parameters, spec, plan),
            plan.ratio,
            plan.transient_bytes,
        )

    def planned(force: str | None, keep_weight: bool = False) -> ContractionPlan:
        return plan_contraction(spec, tokens, dtype, profile, force=force, keep_weight=keep_weight)

    best = planned(None)
    found["planned"] = ours(best)
    if best.kind != "materialise":
        found["materialise"] = ours(planned("materialise"))
    found["planned, W kept"] = ours(planned("materialise", True))
    chains = [planned("chain")] + ([planned("groups")] if spec.num_cores > 2 else [])
    chain = min(chains, key=lambda plan: plan.seconds)
    if best.kind == "materialise" and chain.ratio <= limit:
        found["best chain"] = ours(chain)
    for implementation in ("reconstructed", "factorized"):
        other = tltorch_candidate(spec, cores, TORCH_DTYPES[dtype], implementation)
        if other is not None:
            found[f"tltorch {implementation}"] = other
    naive = planned("chain:lr")
    if naive.flops_ratio <= limit and naive.transient_bytes <= _MOST_TRANSIENT:
        found["naive chain"] = Candidate(
            [nn.Parameter(core.to(TORCH_DTYPES[dtype])) for core in cores], naive_chain(spec)
        )
    return found


def measure_layer(
    label: str,
    spec: MPOSpec,
    dtype: DType,
    profile: DeviceProfile,
    options: argparse.Namespace,
) -> list[Row]:
    """Check that all candidates agree, then measure them."""
    device = torch.device(options.device)
    tokens = options.tokens
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, spec.in_features, generator=generator)
    dy = torch.randn(tokens, spec.out_features, generator=generator)
    x, dy = (t.to(device, TORCH_DTYPES[dtype]) for t in (x, dy))
    x.requires_grad_()
    found = candidates(spec, tokens, dtype, profile, device, options.limit)
    check_agreement(found, x, dtype)

    def step(candidate: Candidate) -> Callable[[], object]:
        def run() -> object:
            y = candidate.forward(x, candidate.parameters)
            return torch.autograd.grad(y, [x, *candidate.parameters], dy)

        return run

    runs = {name: step(candidate) for name, candidate in found.items()}
    timings = interleaved(runs, BASELINE, options.rounds, device)
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    rows = []
    for name, candidate in found.items():
        known = [x, *candidate.parameters]
        saved = saved_bytes(lambda c=candidate: c.forward(x, c.parameters), known)  # type: ignore[misc]
        timing = timings[name]
        rows.append(
            Row(
                layer=label,
                dtype=dtype,
                tokens=tokens,
                name=name,
                **asdict(timing),
                peak_bytes=peaks[name],
                peak_ratio=peaks[name] / peaks[BASELINE],
                saved_bytes=saved,
                predicted=candidate.predicted,
                predicted_transient_bytes=candidate.transient,
                plan=None,
            )
        )
    summary = plan_contraction(spec, tokens, dtype, profile).summary
    return [replace(row, plan=summary) if row.name == "planned" else row for row in rows]


def check_agreement(found: dict[str, Candidate], x: Tensor, dtype: DType) -> None:
    """Refuse to time candidates that do not compute the same function."""
    few = x.detach()[:64]
    expected = found[BASELINE].forward(few, found[BASELINE].parameters).float()
    tolerance = 0.03 if dtype == "bf16" else 1e-3
    for name, candidate in found.items():
        y = candidate.forward(few, candidate.parameters).float()
        error = float((y - expected).detach().norm() / expected.detach().norm())
        if not error < tolerance:
            raise RuntimeError(f"{name} differs from {BASELINE} by {error:.3g} ({x.dtype})")


def plan_accuracy(rows: Sequence[Row]) -> dict[str, float]:
    """Compare predicted and measured ratios: geometric-mean and worst factor, by dtype."""
    accuracy: dict[str, float] = {}
    for dtype in sorted({row.dtype for row in rows}):
        logs = [
            abs(math.log(row.predicted / row.ratio))
            for row in rows
            if row.predicted is not None and row.dtype == dtype
        ]
        accuracy[f"{dtype} geometric mean factor"] = math.exp(sum(logs) / len(logs))
        accuracy[f"{dtype} worst factor"] = math.exp(max(logs))
    return accuracy


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    head = f"{'layer':26} {'dtype':5} {'implementation':22} {'time':>6} {'quartiles':>13}"
    head += f" {'predicted':>9} {'peak':>6} {'peak MiB':>9} {'saved MiB':>9}"
    lines = [head]
    for row in rows:
        predicted = "" if row.predicted is None else f"{row.predicted:.2f}"
        lines.append(
            f"{row.layer:26} {row.dtype:5} {row.name:22} {row.ratio:6.2f} "
            f"{f'{row.low:.2f}-{row.high:.2f}':>13} {predicted:>9} {row.peak_ratio:6.2f} "
            f"{row.peak_bytes / 2**20:9.1f} {row.saved_bytes / 2**20:9.1f}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, tokens and rounds")
    parser.add_argument("--tokens", type=int, help="rows of x (default 4096; quick 1024)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 7; quick 5)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(TORCH_DTYPES), default=["fp32", "bf16"]
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--profile", choices=sorted(PROFILES), help="default: cpu, or h200 on cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--limit", type=float, default=8.0, help="leave out what is slower (x dense)"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (1024 if options.quick else 4096)
    options.rounds = options.rounds or (5 if options.quick else 7)
    options.profile = options.profile or ("h200" if options.device.startswith("cuda") else "cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table and write the JSON file."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for label, spec in layers(options.quick).items():
        for dtype in options.dtypes:
            new = measure_layer(label, spec, dtype, PROFILES[options.profile], options)
            text = table(new)
            print(text if not rows else text.split("\n", 1)[1], flush=True)
            rows += new
    accuracy = plan_accuracy(rows)
    print("plan accuracy: " + ", ".join(f"{k} {v:.2f}" for k, v in accuracy.items()))
    if options.out is not None:
        result: dict[str, Any] = {
            "benchmark": "layer",
            "environment": environment(torch.device(options.device)),
            "options": {k: v for k, v in vars(options).items() if k != "out"},
            "plan_accuracy": accuracy,
            "rows": [asdict(row) for row in rows],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
