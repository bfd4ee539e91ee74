"""Does a checkpoint belong to this model? Differences in words (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpotrain.checkpoint.manifest import Manifest, Signature, signatures
from mpotrain.errors import CheckpointError

SHOWN = 6
"""Number of differences that a message lists before it counts the rest."""


def require_model(
    manifest: Manifest,
    parameters: Mapping[str, Signature],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Make sure that a checkpoint holds exactly the parameters of a model.

    Args:
        manifest: manifest of the checkpoint.
        parameters: role and global shape of every parameter of the model, by logical name.
        config: resolved configuration of this run, to name the keys that differ.

    Raises:
        CheckpointError: the first differing parameters and the differing keys of the
            configuration.
    """
    lines = parameter_differences(signatures(manifest), parameters)
    if not lines:
        return
    text = f"the checkpoint of step {manifest.step} belongs to another model:\n" + _listing(lines)
    if config is not None:
        keys = config_differences(manifest.run.config, config)
        if keys:
            text += "\nthese keys of the configuration differ (checkpoint -> now):\n"
            text += _listing(keys)
    raise CheckpointError(text)


FREE_KEYS = frozenset(
    {
        "dropout", "attention_dropout", "activation_checkpointing",
        "init_std", "init_factor", "residual_init_scaling", "init", "std", "start",
        "auxiliary_scale", "unscaled_layers", "deeper",
        "plan", "keep_weight", "merge_precision",
        "balance_loss", "z_loss", "balance_rate", "jitter",
        "capacity_factor", "eval_capacity_factor",
    }
)  # fmt: skip
"""Last parts of the keys of a model that may change on the way: how weights started, how training
regularises, how a contraction is executed. All others say what the network computes."""


def require_network(manifest: Manifest, model: Mapping[str, Any]) -> None:
    """Refuse to go on with weights in a network that computes something else with them.

    Numbers of heads, activations or norms change no shape, so that the weights would fit.

    Args:
        manifest: the checkpoint.
        model: resolved section `model` of this run. Keys that only one side knows do not count: a
            checkpoint may be older than a key.

    Raises:
        CheckpointError: with every key that differs.
    """
    old, new = _leaves(manifest.run.config.get("model", {})), _leaves(model)
    lines = [
        f"model.{key}: {old[key]!r} in the checkpoint, now {new[key]!r}"
        for key in sorted(old.keys() & new.keys())
        if old[key] != new[key] and key.rpartition(".")[2] not in FREE_KEYS
    ]
    if lines:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} belongs to another network:\n"
            f"{_listing(lines)}\nset them back, or start a run of its own (folder=...)"
        )


def parameter_differences(
    saved: Mapping[str, Signature], wanted: Mapping[str, Signature]
) -> list[str]:
    """Return one line for each parameter that is missing, foreign or of another shape or role."""
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            lines.append(f"{name}: the model has it, the checkpoint does not")
        elif name not in wanted:
            lines.append(f"{name}: the checkpoint has it, the model does not")
        else:
            (old_role, old_shape), (role, shape) = saved[name], wanted[name]
            if tuple(old_shape) != tuple(shape):
                lines.append(
                    f"{name}: shape {list(old_shape)} in the checkpoint, now {list(shape)}"
                )
            elif old_role != role:
                lines.append(f"{name}: role {old_role} in the checkpoint, now {role}")
    return lines


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ, those of the model first.

    Args:
        saved: resolved configuration in the checkpoint.
        current: resolved configuration of this run; tuples equal lists.
    """
    old, new = _leaves(saved), _leaves(current)
    keys = sorted(old.keys() | new.keys(), key=lambda key: (not key.startswith("model."), key))
    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in keys
        if key not in old or key not in new or old[key] != new[key]
    ]


def _leaves(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        merged: dict[str, Any] = {}
        for key, item in value.items():
            merged |= _leaves(item, f"{at}.{key}" if at else str(key))
        return merged
    if isinstance(value, list | tuple):
        return {at: [_leaves(item) if isinstance(item, Mapping) else item for item in value]}
    return {at: value}


def _listing(lines: list[str]) -> str:
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  ... and {len(lines) - SHOWN} more")
    return "\n".join(shown)
