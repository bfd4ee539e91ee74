"""How far one step moves a deep network: why auxiliary tensors start smaller with the depth.

    python -m benchmarks.update_size [--out benchmarks/results/update-size.json]

Liu et al. 2023 (MPOBERT, section 3.3 and appendix A.2) bound the change of the output of a deep
post-norm network after one step, and scale the auxiliary tensors with the depth L so that the
bound stays O(1). Two tables of ||F_after - F_before|| per sample, mean over seeds:

* linear: L layers ``z <- LN(z + z W_l)``, W_l = U_l C V_l with three cores; C is shared, pretrained
  in the paper, here random and frozen; U_l and V_l are Xavier draws, times 1 or (2L)^(-1/4);
* encoder: a whole depth-shared encoder with five cores in every matrix, scaled not at all, per side
  or per tensor; the change of its hidden states after one step on the loss of masked tokens.

Layers, start values and scaling are those that runs use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.measure import environment
from mpotrain.batch import Batch
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.deep_init import AuxiliaryScale, auxiliary_factors
from mpotrain.nn.norm import layer_norm
from mpotrain.nn.roles import Role, role_of
from mpotrain.nn.sharing import SharedLinear
from mpotrain.nn.sharing_config import SharingConfig, StartConfig

DEPTHS = (3, 6, 12, 24, 48, 96, 192)
ENCODER_DEPTHS = (3, 6, 12, 24, 48)
SEEDS = (0, 1, 2)
WIDTH, SAMPLES = 64, 32
LINEAR_RATE, ENCODER_RATE = 0.05, 0.005
"""Learning rates, low enough that the shallow networks are far from saturation."""
THREE_CORES = MPOSite(in_modes=(8, 1, 8), out_modes=(8, 1, 8))
"""W (64 x 64) = U C V with C (64 x 64): the two matrices around C have all modes."""
SQUARE = MPOSite(in_modes=(2, 2, 2, 2, 2), out_modes=(2, 2, 2, 2, 2))
SITES = EncoderSites(
    query=SQUARE,
    key=SQUARE,
    value=SQUARE,
    attention_out=SQUARE,
    c_fc=MPOSite(in_modes=(2, 2, 2, 2, 2), out_modes=(2, 2, 4, 4, 2)),
    c_proj=MPOSite(in_modes=(2, 2, 4, 4, 2), out_modes=(2, 2, 2, 2, 2)),
)


@dataclass(frozen=True)
class Change:
    """One line of a table.

    Attributes:
        network: "linear" or "encoder".
        depth: layers L.
        scale: how auxiliary tensors are scaled.
        change: mean over samples and seeds of the norm of the change of a sample's output.
    """

    network: str
    depth: int
    scale: AuxiliaryScale
    change: float


def linear_change(depth: int, scale: AuxiliaryScale, seed: int) -> float:
    """Return the change of a deep stack of shared linear layers after one SGD step."""
    generator = torch.Generator().manual_seed(seed)
    spec = THREE_CORES.spec(WIDTH, WIDTH)
    left, middle, right = (torch.Size(shape) for shape in spec.core_shapes)
    bond, spread = left[-1], (2.0 / (left[-1] + right[0])) ** 0.5
    central = torch.randn(middle, generator=generator) * bond**-0.5
    factors = auxiliary_factors(spec, scale, depth)
    layers = [
        SharedLinear(
            spec,
            THREE_CORES,
            [
                factor * spread * torch.randn(shape, generator=generator)
                for factor, shape in zip(factors, (left, right), strict=True)
            ],
            bias=False,
            bank="central",
        )
        for _ in range(depth)
    ]
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    wanted = torch.randn(SAMPLES, WIDTH, generator=generator)
    ones, zeros = torch.ones(WIDTH), torch.zeros(WIDTH)

    def output() -> Tensor:
        z = x
        for layer in layers:
            z = layer_norm(z + layer(z, central), ones, zeros, 1e-5)
        return z

    before = output()
    loss = (before - wanted).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    _descend((p for layer in layers for p in layer.parameters()), LINEAR_RATE)
    with torch.no_grad():
        return float((output() - before).norm(dim=-1).mean())


def encoder_change(depth: int, scale: AuxiliaryScale, seed: int) -> float:
    """Return the change of the hidden states of a depth-shared encoder after one SGD step."""
    config = EncoderConfig(
        vocab_size=64,
        context_length=16,
        hidden_size=32,
        num_layers=depth,
        num_heads=2,
        ffn_size=128,
        dropout=0.0,
        attention_dropout=0.0,
        pair_head=False,
        init_std=32**-0.5,
        sites=SITES,
        sharing=SharingConfig(scope="central", start="independent"),
        start=StartConfig(auxiliary_scale=scale),
    )
    model = Encoder(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(64, (2, 8, 16), generator=generator)
    mask = torch.rand(8, 16, generator=generator) < 0.3
    batch = Batch(tokens, targets, mask, torch.arange(8))
    with torch.no_grad():
        before = model.hidden(batch)
    output = model(batch)
    (output.loss_sum / output.num_tokens).backward()
    _descend((p for p in model.parameters() if role_of(p) is Role.AUXILIARY), ENCODER_RATE)
    with torch.no_grad():
        return float((model.hidden(batch) - before).norm(dim=-1).mean())


@torch.no_grad()
def _descend(parameters: Iterable[Tensor], rate: float) -> None:
    for parameter in parameters:
        assert parameter.grad is not None
        parameter -= rate * parameter.grad


def linear_table(depths: Sequence[int], seeds: Sequence[int]) -> list[Change]:
    """Measure the linear networks."""
    scales: tuple[AuxiliaryScale, ...] = ("none", "per_side")
    return [
        Change("linear", depth, scale, mean(linear_change(depth, scale, seed) for seed in seeds))
        for depth in depths
        for scale in scales
    ]


def encoder_table(depths: Sequence[int], seeds: Sequence[int]) -> list[Change]:
    """Measure the encoders."""
    scales: tuple[AuxiliaryScale, ...] = ("none", "per_side", "per_tensor")
    return [
        Change("encoder", depth, scale, mean(encoder_change(depth, scale, seed) for seed in seeds))
        for depth in depths
        for scale in scales
    ]


def ratio(rows: Sequence[Change], depth: int) -> float:
    """Return by how much scaling per side reduces the change at a depth."""
    changes = {row.scale: row.change for row in rows if row.depth == depth}
    return changes["none"] / changes["per_side"]


def text_table(rows: Sequence[Change]) -> str:
    """Return rows of one network as text: a line for each scaling, a column for each depth."""
    depths = sorted({row.depth for row in rows})
    scales = list(dict.fromkeys(row.scale for row in rows))
    found = {(row.scale, row.depth): row.change for row in rows}
    head = f"{rows[0].network:<12}" + "".join(f"{f'L = {depth}':>10}" for depth in depths)
    lines = [
        f"{scale:<12}" + "".join(f"{found[scale, depth]:>10.3g}" for depth in depths)
        for scale in scales
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """Measure both tables, print them and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = linear_table(DEPTHS, SEEDS), encoder_table(ENCODER_DEPTHS, SEEDS)
    for rows in tables:
        print(text_table(rows), end="\n\n")
    print(f"scaled per side, 48 linear layers change {ratio(tables[0], 48):.1f} times less")
    if options.out is not None:
        record = {
            "environment": environment(torch.device("cpu")),
            "learning_rates": {"linear": LINEAR_RATE, "encoder": ENCODER_RATE},
            "seeds": SEEDS,
            "rows": [asdict(row) for rows in tables for row in rows],
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
