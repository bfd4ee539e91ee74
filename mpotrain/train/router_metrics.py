"""What the routers of the mixtures did in a step, from the sums that the engine returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def router_metrics(statistics: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Return loads, losses and dropped pairs of every mixture, and their mean over mixtures.

    Args:
        statistics: sums over the global batch of a step, one row for each of L mixtures:
            `expert_tokens` (L, E) and `routed` (L,) count (token, choice) pairs, `dropped` (L,)
            those beyond the capacity of their expert; `balance_loss`, `z_loss` and
            `router_entropy` (L,) are summed over the `tokens` (L,).
        names: of the mixtures, in the order of the rows.

    Returns:
        JSON values of each mixture by name, and of their mean by "mean":
        `load` (share of all pairs that goes to each expert, list of E; not in the mean),
        `max_over_mean` (largest load over the even share 1 / E; 1 is balanced, E is one expert
        for all), `dropped_share` (of the pairs), `balance_loss` and `z_loss` (per token, without
        their weights), `entropy` (of the router's distribution, nats per token) and
        `idle_experts` (experts that no token has chosen).

    Raises:
        ValueError: there are not as many names as rows.
    """
    rows = {key: value.tolist() for key, value in statistics.items()}
    found = {
        name: _mixture({key: row[layer] for key, row in rows.items()})
        for layer, name in enumerate(_checked(names, statistics))
    }
    return {"mean": _mean(list(found.values())), **found}


def load_histograms(
    statistics: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, list[float]]:
    """Return the number of pairs of each expert, `name/load` -> counts of E bins.

    Args:
        statistics: see `router_metrics`.
        names: of the mixtures, in the order of the rows.

    Raises:
        ValueError: there are not as many names as rows.
    """
    counts = statistics["expert_tokens"].tolist()
    return {f"{name}/load": counts[n] for n, name in enumerate(_checked(names, statistics))}


def _checked(names: Sequence[str], statistics: Mapping[str, Tensor]) -> Sequence[str]:
    num_rows = len(statistics["expert_tokens"])
    if len(names) != num_rows:
        raise ValueError(f"{len(names)} names {list(names)} for {num_rows} mixtures")
    return names


def _mixture(sums: Mapping[str, Any]) -> dict[str, Any]:
    counts: list[float] = sums["expert_tokens"]
    # A step without any token has no loads; its line shall be written all the same.
    chosen, tokens = max(sum(counts), 1.0), max(sums["tokens"], 1.0)
    return {
        "load": [count / chosen for count in counts],
        "max_over_mean": max(counts) * len(counts) / chosen,
        "dropped_share": sums["dropped"] / max(sums["routed"], 1.0),
        "balance_loss": sums["balance_loss"] / tokens,
        "z_loss": sums["z_loss"] / tokens,
        "entropy": sums["router_entropy"] / tokens,
        "idle_experts": float(sum(count == 0 for count in counts)),
    }


def _mean(mixtures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    keys = [key for key in mixtures[0] if key != "load"] if mixtures else []
    return {key: sum(mixture[key] for mixture in mixtures) / len(mixtures) for key in keys}
