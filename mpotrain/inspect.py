"""What `mpotrain inspect` shows: checkpoints with their cores and entanglement, prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpotrain.checkpoint.manifest import Manifest as CheckpointManifest
from mpotrain.data.manifest import Manifest as DataManifest
from mpotrain.nn.spectra import SiteSpectrum
from mpotrain.tensor.spec import exact_bonds


@dataclass(frozen=True)
class SiteRow:
    """One tensorized layer of a checkpoint.

    Attributes:
        name: logical name.
        shape: (in, out).
        modes: (i, j) of each core.
        bonds: inner bond dimensions.
        full_bonds: exact bonds, with which any matrix could be held.
        parameters: of the cores, of all experts.
        dense_parameters: of the dense matrix, or of one for each expert.
        core_norms: Frobenius norm of each core.
        weight_norm: Frobenius norm of the rebuilt matrix.
        entropies: entanglement entropy of each bond, nats.
        normalised: entropy over its largest possible value for that bond.
        num_experts: experts of a mixture, over which norms and entropies are means; else 0.
        expert_spread: how far experts lie apart: 0 for copies, nearly 1 for independent ones.
    """

    name: str
    shape: tuple[int, int]
    modes: list[tuple[int, int]]
    bonds: list[int]
    full_bonds: list[int]
    parameters: int
    dense_parameters: int
    core_norms: list[float]
    weight_norm: float
    entropies: list[float]
    normalised: list[float]
    num_experts: int
    expert_spread: float


def site_rows(spectra: Sequence[SiteSpectrum]) -> list[SiteRow]:
    """Turn the spectra of a model into rows."""
    return [
        SiteRow(
            name=site.name,
            shape=(site.spec.in_features, site.spec.out_features),
            modes=list(zip(site.spec.in_modes, site.spec.out_modes, strict=True)),
            bonds=list(site.spec.bonds),
            full_bonds=list(exact_bonds(site.spec.in_modes, site.spec.out_modes)),
            parameters=site.num_parameters,
            dense_parameters=site.spec.dense_parameters * max(site.num_experts, 1),
            core_norms=site.norms,
            weight_norm=site.weight_norm,
            entropies=site.entropies,
            normalised=site.normalised,
            num_experts=site.num_experts,
            expert_spread=site.expert_spread,
        )
        for site in spectra
    ]


def describe_checkpoint(
    manifest: CheckpointManifest, num_parameters: int, rows: Sequence[SiteRow]
) -> tuple[dict[str, Any], str]:
    """Describe a checkpoint as plain data and as text."""
    run = manifest.run
    own = sum(row.parameters for row in rows)
    dense = sum(row.dense_parameters for row in rows)
    whole_if_dense = num_parameters - own + dense
    data = {
        "name": run.config.get("name"),
        "step": run.step,
        "num_updates": run.num_updates,
        "consumed_samples": run.consumed_samples,
        "tokens": run.train_state.get("tokens"),
        "written_by": run.engine,
        "versions": manifest.versions,
        "num_parameters": num_parameters,
        "num_parameters_if_dense": whole_if_dense,
        "bytes": manifest.num_bytes,
    }
    lines = [
        f"checkpoint of {data['name']!s}: step {run.step:,}, {run.num_updates:,} updates, "
        f"{run.consumed_samples:,} samples, {data['tokens'] or 0:,} tokens",
        f"  written by {' '.join(f'{k}={v}' for k, v in run.engine.items() if v is not None)}; "
        + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        f"  {manifest.num_bytes:,} bytes in {len(manifest.files)} file(s)",
        f"  parameters {num_parameters:,}, if dense {whole_if_dense:,} "
        f"({whole_if_dense / num_parameters:.3f} x)",
    ]
    if rows:
        lines += [
            f"  tensorized part alone: {own:,} of {dense:,} ({100 * own / dense:.2f} %)",
            "",
            f"{'layer':<28} {'in x out':>13} {'of dense':>9} {'|W|':>8}  "
            "bonds used/full, normalised entropy; core norms",
            *map(_row_line, rows),
        ]
    return data, "\n".join(lines)


def _row_line(row: SiteRow) -> str:
    bonds = "  ".join(
        f"{bond}/{full} {entropy:.3f}"
        for bond, full, entropy in zip(row.bonds, row.full_bonds, row.normalised, strict=True)
    )
    norms = " ".join(f"{norm:.3g}" for norm in row.core_norms)
    if row.num_experts:
        norms += f"; {row.num_experts} experts, spread {row.expert_spread:.3f}"
    ratio = f"{100 * row.parameters / row.dense_parameters:.2f} %"
    return (
        f"{row.name:<28} {f'{row.shape[0]} x {row.shape[1]}':>13} {ratio:>9} "
        f"{row.weight_norm:>8.3g}  {bonds}; {norms}"
    )


def describe_data(folder: Path, manifest: DataManifest) -> tuple[dict[str, Any], str]:
    """Describe a prepared folder as plain data and as text."""
    data = {
        "folder": str(folder),
        "num_documents": manifest.num_documents,
        "num_tokens": manifest.num_tokens,
        "num_bytes": manifest.num_bytes,
        "num_shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "vocab_size": manifest.tokenizer.vocab_size,
        "tokenizer": manifest.tokenizer.kind,
        "digest": manifest.digest,
        "sources": list(manifest.sources),
        "extra": dict(manifest.extra),
    }
    per_token = manifest.num_bytes / max(manifest.num_tokens, 1)
    lines = [
        f"prepared data in {folder}: {manifest.num_documents:,} documents, "
        f"{manifest.num_tokens:,} tokens, {manifest.num_bytes:,} bytes of text "
        f"({per_token:.2f} bytes per token)",
        f"  {len(manifest.shards)} shard(s) of {manifest.dtype}, {manifest.tokenizer.kind} "
        f"tokenizer with {manifest.tokenizer.vocab_size:,} pieces",
        f"  digest {manifest.digest}",
        *(f"  from {source}" for source in manifest.sources),
        *(f"  {key}: {value}" for key, value in manifest.extra.items()),
    ]
    return data, "\n".join(lines)
