"""Experts that share a central tensor against nn.Linear, dense experts and released ways.

Run it with ``python -m benchmarks.moe [--experts 8 32 128] [--out FILE]``. Every candidate is one
expert layer 768 -> 3072, forward and backward, over rows that are sorted by expert and spread
evenly (top-1); times are relative to one dense nn.Linear over the same rows. Candidates:

* dense experts: a matrix for each expert, through torch's grouped product;
* released way: what the code of Gao et al. 2022 does, a chain of tensordot for every expert, a
  stack of all matrices and one einsum;
* published shape: the same operator (five cores) by our grouped plan;
* asymmetric: input modes left, output modes right of the central tensor, factored by our plan, or
  all experts rebuilt by plain tensor operations and multiplied by torch's grouped product.

What every candidate computes is compared with a plain loop over experts before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import environment, interleaved, peak_bytes, saved_bytes
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.device import PROFILES, DType
from mpotrain.tensor.expert_linear import expert_linear
from mpotrain.tensor.expert_plan import ExpertKind, ExpertPlan, MergePrecision, plan_experts
from mpotrain.tensor.experts import ExpertShape, asymmetric_spec, auxiliary_shapes
from mpotrain.tensor.init import init_cores
from mpotrain.tensor.spec import MPOSpec, mpo_spec

BASELINE = "nn.Linear"
ROWS, COLUMNS = 768, 3072
TORCH_DTYPES: dict[DType, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPECS: dict[str, MPOSpec] = {
    "published shape, full bonds": mpo_spec(ROWS, COLUMNS, (3, 4, 4, 4, 4), (4, 4, 8, 6, 4)),
    "published shape, bonds 64": mpo_spec(ROWS, COLUMNS, (3, 4, 4, 4, 4), (4, 4, 8, 6, 4), cap=64),
    "asymmetric, full central": asymmetric_spec(ROWS, COLUMNS, 64, 64),
    "asymmetric, half bonds": asymmetric_spec(ROWS, COLUMNS, 64, 64, 32, 32),
}

Forward = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One implementation of one layer.

    Attributes:
        parameters: what is trained.
        forward: x (rows, 768) and the parameters to y (rows, 3072).
        weights: the experts' matrices (E, 768, 3072) that it has to agree with.
        plan: how it is computed; None for other implementations.
    """

    parameters: list[Tensor]
    forward: Forward
    weights: Callable[[], Tensor]
    plan: ExpertPlan | None = None


@dataclass(frozen=True)
class Row:
    """Results of one candidate (times relative to nn.Linear of the same round)."""

    num_experts: int
    dtype: str
    tokens: int
    layer: str
    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    peak_bytes: int
    saved_bytes: int
    num_parameters: int
    error: float
    predicted: float | None
    plan: str | None


class Cores:
    """The shared central tensor and the auxiliaries of all experts of one operator."""

    def __init__(self, spec: MPOSpec, num_experts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spec, self.num_experts = spec, num_experts
        first = init_cores(spec, 0.02, generator=generator)
        self.central = first[spec.central_index]
        self.auxiliaries = [
            torch.randn(num_experts, *shape, generator=generator)
            * next(core for core in first if core.shape == torch.Size(shape)).std()
            for shape in auxiliary_shapes(spec)
        ]

    def parameters(self, dtype: torch.dtype) -> list[Tensor]:
        """Return fresh parameters, the central tensor first."""
        return [t.to(dtype, copy=True).requires_grad_() for t in (self.central, *self.auxiliaries)]

    def weights(self) -> Tensor:
        """Return the matrices of all experts in fp32."""
        c = self.spec.central_index
        matrices = []
        for expert in range(self.num_experts):
            own = [auxiliary[expert] for auxiliary in self.auxiliaries]
            matrices.append(rebuild([*own[:c], self.central, *own[c:]], self.spec))
        return torch.stack(matrices)


def planned(
    cores: Cores,
    tokens: int,
    dtype: DType,
    force: ExpertKind | None,
    merge_precision: MergePrecision = "fp32",
) -> Candidate:
    """Return our layer by a plan: the cheapest one, or the cheapest of one kind."""
    spec, counts = cores.spec, even_counts(cores.num_experts, tokens)
    plan = plan_experts(
        spec,
        cores.num_experts,
        tokens,
        dtype,
        PROFILES["cpu"],
        force,
        merge_precision=merge_precision,
    )

    def forward(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return expert_linear(x, parameters[0], parameters[1:], spec, counts, plan)

    return Candidate(cores.parameters(torch.float32), forward, cores.weights, plan)


def released(cores: Cores, dtype: DType) -> Candidate:
    """Return the computation of the released MPOE code: tensordot chains, stack, einsum."""
    spec, num_experts = cores.spec, cores.num_experts
    c, n = spec.central_index, spec.num_cores

    def forward(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        matrices = []
        for expert in range(num_experts):
            own = [auxiliary[expert] for auxiliary in parameters[1:]]
            chain = [*own[:c], parameters[0], *own[c:]]
            product = chain[0]
            for core in chain[1:]:
                product = torch.tensordot(product, core, ([product.ndim - 1], [0]))
            modes = product.squeeze(0).squeeze(-1)
            order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
            matrices.append(modes.permute(order).reshape(ROWS, COLUMNS))
        experts = x.view(num_experts, -1, ROWS)
        y = torch.einsum("end,edh->enh", experts, torch.stack(matrices))
        return y.reshape(len(x), COLUMNS)

    return Candidate(cores.parameters(TORCH_DTYPES[dtype]), forward, cores.weights)


def rebuilt(cores: Cores, tokens: int, dtype: DType) -> Candidate:
    """Return all experts rebuilt by batched products under autograd, then a grouped product."""
    s, num_experts = ExpertShape.of(cores.spec), cores.num_experts
    ends = row_ends(num_experts, tokens)

    def forward(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        central, left, right = parameters
        half = left.reshape(-1, s.left_bond) @ central.reshape(s.left_bond, -1)
        half = half.view(num_experts, -1, s.right_bond)
        weight = torch.bmm(half, right.reshape(num_experts, s.right_bond, -1))
        return functional.grouped_mm(x, weight.view(num_experts, ROWS, COLUMNS), offs=ends)

    return Candidate(cores.parameters(TORCH_DTYPES[dtype]), forward, cores.weights)


def dense_experts(num_experts: int, tokens: int, dtype: DType) -> Candidate:
    """Return a matrix of its own for every expert, through torch's grouped product."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(num_experts, ROWS, COLUMNS, generator=generator)
    weight = weight.to(TORCH_DTYPES[dtype]).requires_grad_()
    ends = row_ends(num_experts, tokens)
    return Candidate(
        [weight],
        lambda x, parameters: functional.grouped_mm(x, parameters[0], offs=ends),
        lambda: weight.detach().float(),
    )


def linear_layer(num_experts: int, dtype: DType) -> Candidate:
    """Return one dense layer for all rows, the baseline."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(COLUMNS, ROWS, generator=generator)
    weight = weight.to(TORCH_DTYPES[dtype]).requires_grad_()
    return Candidate(
        [weight],
        lambda x, parameters: functional.linear(x, parameters[0]),
        lambda: weight.detach().float().t().expand(num_experts, -1, -1),
    )


def even_counts(num_experts: int, tokens: int) -> list[int]:
    """Return the rows of each expert under balanced routing."""
    return [tokens // num_experts] * num_experts


def row_ends(num_experts: int, tokens: int) -> Tensor:
    """Return the row after the last one of each expert."""
    return torch.tensor(even_counts(num_experts, tokens), dtype=torch.int32).cumsum(0).int()


def candidates(
    num_experts: int, tokens: int, dtype: DType, limit: float
) -> dict[tuple[str, str], Candidate]:
    """Return all implementations by layer and name, those predicted above the limit left out."""
    found: dict[tuple[str, str], Candidate] = {
        ("one dense layer", BASELINE): linear_layer(num_experts, dtype),
        ("dense experts", "torch grouped_mm"): dense_experts(num_experts, tokens, dtype),
    }
    for layer, spec in SPECS.items():
        cores = Cores(spec, num_experts)
        asymmetric = layer.startswith("asymmetric")
        auto = planned(cores, tokens, dtype, None)
        assert auto.plan is not None
        found[layer, f"ours, auto ({auto.plan.kind})"] = auto
        if asymmetric:
            found[layer, "rebuilt, torch grouped_mm"] = rebuilt(cores, tokens, dtype)
            found[layer, "ours, grouped"] = planned(cores, tokens, dtype, "grouped")
        elif dtype != "fp32":
            found[layer, f"ours, grouped, merged in {dtype}"] = planned(
                cores, tokens, dtype, "grouped", "compute"
            )
        if layer == "published shape, full bonds" and num_experts <= 32:
            found[layer, "released way"] = released(cores, dtype)
    return {
        key: candidate
        for key, candidate in found.items()
        if candidate.plan is None or candidate.plan.ratio <= limit
    }


def relative_error(candidate: Candidate, x: Tensor, num_experts: int) -> float:
    """Compare with a loop over the experts in fp32, over all rows.

    Raises:
        RuntimeError: the candidate computes something else.
    """
    with torch.no_grad():
        y = candidate.forward(x, candidate.parameters).float()
        weights = candidate.weights()
        square = rest = 0.0
        for rows, got, weight in zip(
            x.detach().chunk(num_experts), y.chunk(num_experts), weights, strict=True
        ):
            expected = rows.float() @ weight
            rest += float((got - expected).square().sum())
            square += float(expected.square().sum())
    error = math.sqrt(rest / square)
    if not error < (0.05 if x.dtype == torch.bfloat16 else 1e-4):
        raise RuntimeError(f"a candidate is off by {error:.3g} ({x.dtype}, {num_experts} experts)")
    return error


def measure(num_experts: int, dtype: DType, options: argparse.Namespace) -> list[Row]:
    """Check and measure all candidates for one number of experts."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    tokens = options.tokens
    x = torch.randn(tokens, ROWS, generator=generator).to(TORCH_DTYPES[dtype]).requires_grad_()
    dy = torch.randn(tokens, COLUMNS, generator=generator).to(TORCH_DTYPES[dtype])
    found = candidates(num_experts, tokens, dtype, options.limit)
    errors = {key: relative_error(candidate, x, num_experts) for key, candidate in found.items()}

    def step(candidate: Candidate) -> Callable[[], object]:
        def run() -> object:
            y = candidate.forward(x, candidate.parameters)
            return torch.autograd.grad(y, [x, *candidate.parameters], dy)

        return run

    runs = {" / ".join(key): step(candidate) for key, candidate in found.items()}
    timings = interleaved(runs, f"one dense layer / {BASELINE}", options.rounds, device)
    rows = []
    for key, candidate in found.items():
        known = [x, *candidate.parameters]
        saved = saved_bytes(lambda c=candidate: c.forward(x, c.parameters), known)  # type: ignore[misc]
        label, plan = " / ".join(key), candidate.plan
        rows.append(
            Row(
                num_experts,
                dtype,
                tokens,
                *key,
                **asdict(timings[label]),
                peak_bytes=peak_bytes(runs[label], device),
                saved_bytes=saved,
                num_parameters=sum(parameter.numel() for parameter in candidate.parameters),
                error=errors[key],
                predicted=None if plan is None else plan.ratio,
                plan=None if plan is None else plan.summary,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    lines = [
        f"{'E':>4} {'dtype':5} {'layer':27} {'implementation':28} {'time':>6} {'quartiles':>13} "
        f"{'predicted':>9} {'peak MiB':>9} {'saved MiB':>9} {'error':>8}"
    ]
    for row in rows:
        predicted = "" if row.predicted is None else f"{row.predicted:.2f}"
        lines.append(
            f"{row.num_experts:4} {row.dtype:5} {row.layer:27} {row.name:28} {row.ratio:6.2f} "
            f"{f'{row.low:.2f}-{row.high:.2f}':>13} {predicted:>9} {row.peak_bytes / 2**20:9.1f} "
            f"{row.saved_bytes / 2**20:9.1f} {row.error:8.1e}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--tokens", type=int, default=4096, help="rows over all experts")
    parser.add_argument(
        "--rounds", type=int, choices=range(2, 100), default=7, metavar="N", help="timed rounds"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(TORCH_DTYPES), default=["bf16", "fp32"]
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--limit", type=float, default=40.0, help="leave out plans predicted slower (x dense)"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args(arguments)
    uneven = [number for number in options.experts if options.tokens % number]
    if uneven:
        parser.error(f"--tokens {options.tokens} cannot be spread evenly over {uneven[0]} experts")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table and write the JSON file."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for num_experts in options.experts:
        for dtype in options.dtypes:
            new = measure(num_experts, dtype, options)
            text = table(new)
            print(text if not rows else text.split("\n", 1)[1], flush=True)
            rows += new
    if options.out is not None:
        result: dict[str, Any] = {
            "benchmark": "moe",
            "environment": environment(torch.device("cpu")),
            "options": {key: value for key, value in vars(options).items() if key != "out"},
            "specs": {layer: asdict(spec) for layer, spec in SPECS.items()},
            "rows": [asdict(row) for row in rows],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
