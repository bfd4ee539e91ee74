"""The verdict as JSON and as lines for people (no torch)."""

from __future__ import annotations

from typing import Any

from mpotrain.preflight.facts import GroupFacts, NodeFacts, WorldFacts, plain
from mpotrain.preflight.verdict import Verdict


def summary_of(facts: WorldFacts, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        facts: what was measured.
        verdict: what it means.
        seconds: how long it took.
    """
    names = {node.number: node.name for node in facts.nodes}
    return {
        "ok": verdict.ok,
        "seconds": round(seconds, 3),
        "num_nodes": len(facts.nodes),
        "num_ranks": sum(node.num_ranks for node in facts.nodes),
        "bad_nodes": [plain(node) for node in verdict.bad_nodes],
        "problems": list(verdict.problems),
        "warnings": list(verdict.warnings),
        "measurements": {
            "nodes": {node.name: _node(node) for node in facts.nodes},
            "inside": [_group(group, names) for group in facts.inside],
            "pairs": [_group(group, names) for group in facts.pairs],
            "whole": None if facts.whole is None else _group(facts.whole, names),
        },
    }


def describe(summary: dict[str, Any]) -> str:
    """Return the verdict as lines for people: one for each bad node.

    Args:
        summary: content of `summary.json`.
    """
    lines = [
        f"{'bad' if node['certain'] else 'suspect'} node {node['node']}: "
        + "; and ".join(node["problems"])
        for node in summary["bad_nodes"]
    ]
    lines += [f"problem: {problem}" for problem in summary["problems"]]
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    count = f"{summary['num_nodes']} node(s), {summary['num_ranks']} rank(s)"
    if summary["ok"]:
        state = "all good"
    else:
        state = f"{len(summary['bad_nodes'])} node(s) named" if summary["bad_nodes"] else "failed"
    lines.append(f"pre-flight of {count}: {state} in {summary['seconds']:.1f} s{_speeds(summary)}")
    return "\n".join(lines)


def _speeds(summary: dict[str, Any]) -> str:
    measured = summary["measurements"]
    found = []
    writes = [
        disk["write_mib_per_s"]
        for node in measured["nodes"].values()
        for disk in node["disks"]
        if disk["purpose"] == "run folder" and disk["write_mib_per_s"] is not None
    ]
    if writes:
        found.append(f"run folder at least {min(writes):.0f} MiB/s")
    for key, what in (("inside", "inside a node"), ("pairs", "between nodes")):
        speeds = [g["gib_per_s"] for g in measured[key] if g["gib_per_s"] is not None]
        if speeds:
            found.append(f"all-reduce {what} at least {min(speeds):.2f} GiB/s")
    return "; " + ", ".join(found) if found else ""


def _node(node: NodeFacts) -> dict[str, Any]:
    return {
        "number": node.number,
        "num_ranks": node.num_ranks,
        "answered": node.met,
        "gpus": [plain(gpu) for gpu in node.gpus],
        "disks": [plain(disk) for disk in node.disks],
        "clock": None if node.clock is None else plain(node.clock),
        "versions": node.versions,
    }


def _group(group: GroupFacts, names: dict[int, str]) -> dict[str, Any]:
    return {
        "nodes": [names[number] for number in group.nodes],
        "gib_per_s": group.gib_per_s,
        "error": group.error,
    }
