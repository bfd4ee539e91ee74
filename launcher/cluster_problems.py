"""What is wrong with texts of a cluster file that end up as options, modules and variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

from mpotrain.preflight.hostlist import expand_hostlist
from mpotrain.schema import collect_problems

_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+:=@-]*")
_MEMORY = re.compile(r"[0-9]+([KMGT]B?)?", re.IGNORECASE)
_NODE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

OWN_OPTIONS = {
    "--nodes": "nodes",
    "--ntasks": "ranks_per_node",
    "--ntasks-per-node": "ranks_per_node",
    "--cpus-per-task": "cpus_per_rank",
    "--mem": "memory",
    "--time": "time",
    "--partition": "partition",
    "--account": "account",
    "--qos": "qos",
    "--constraint": "constraint",
    "--reservation": "reservation",
    "--exclude": "exclude",
    "--gpus-per-node": "gpus_per_node",
    "--signal": "lives.warning_seconds",
    "--requeue": "lives.requeue",
    "--no-requeue": "lives.requeue",
    "--job-name": "--name on the command line",
    "--dependency": "--after on the command line",
    "--output": None,
    "--error": None,
    "--open-mode": None,
    "--chdir": None,
    "--export": None,
    "--export-file": None,
    "--parsable": None,
    "--array": None,
    "--wrap": None,
    "--wait": None,
    "--test-only": None,
}
"""Options of sbatch that the launcher sets itself, and which key decides them."""

OWN_VARIABLES = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MPOTRAIN_PYTHON",
    "MPOTRAIN_MODULES",
}
"""Variables that the launcher sets itself."""


def text_problems(texts: Mapping[str, str | None]) -> list[str]:
    """Return which optional texts are empty or hold control characters.

    Args:
        texts: by dotted key.
    """
    found = []
    for key, text in texts.items():
        if text is None:
            continue
        if not text.strip():
            found.append(f"{key}: is empty; leave it out")
        elif not text.isprintable():
            found.append(f"{key}: {text!r} holds characters that cannot be printed")
    return found


def path_problems(paths: Mapping[str, str | None]) -> list[str]:
    """Return which paths would need a shell, which none of them meets.

    Args:
        paths: by dotted key; what is shown inside of a container may be several of them, each
            `SOURCE:TARGET`. None is left out.
    """
    found = []
    for key, path in paths.items():
        # The user name of NVIDIA's registry of images.
        parts = re.split("[:,]", (path or "").replace("$oauthtoken@", ""))
        if any(part.startswith("~") or "$" in part for part in parts):
            found.append(
                f"{key}: {path!r} is seen by no shell; write the whole path, without ~ and $"
            )
    return found


def memory_problems(memory: str | None, where: str) -> list[str]:
    """Return why a text is no memory of a node, as SLURM takes it.

    Args:
        memory: the text; None and blanks are told elsewhere.
        where: its dotted key.
    """
    if memory is None or not memory.strip() or _MEMORY.fullmatch(memory):
        return []
    return [
        f"{where}: {memory!r} is no memory; write a whole number with K, M, G or T behind it "
        '("64G"), or "0" for all that a node has'
    ]


def node_list_problems(nodes: str | None, where: str) -> list[str]:
    """Return why a text is no list of nodes.

    Args:
        nodes: the text; None and blanks are told elsewhere.
        where: its dotted key.
    """
    if nodes is None or not nodes.strip():
        return []
    names = expand_hostlist(nodes)
    if names and all(_NODE.fullmatch(name) for name in names):
        return []
    return [
        f"{where}: {nodes!r} is no list of nodes; write names with commas between them, and ranges "
        'in brackets ("node[3-4],node9")'
    ]


def extra_problems(options: Sequence[str], where: str) -> list[str]:
    """Return which further options of sbatch cannot be passed on.

    Args:
        options: one argument each.
        where: dotted key of the list.
    """
    found = []
    for index, option in enumerate(options):
        at = f"{where}[{index}]"
        name = option.partition("=")[0]
        if not re.fullmatch(r"--[a-z][a-z-]*", name) or not option.isprintable():
            found.append(f"{at}: {option!r} must be --option or --option=value")
        elif name in OWN_OPTIONS:
            key = OWN_OPTIONS[name]
            instead = f"use {key}" if key else "leave it out"
            found.append(f"{at}: {name} is set by the launcher; {instead}")
    return found


def module_problems(modules: Sequence[str], where: str) -> list[str]:
    """Return which names cannot be names of environment modules.

    Args:
        modules: the names.
        where: dotted key of the list.
    """
    return [
        f"{where}[{index}]: {name!r} is no name of a module"
        for index, name in enumerate(modules)
        if not _MODULE.fullmatch(name)
    ]


def environment_problems(environment: Mapping[str, str], where: str) -> list[str]:
    """Return which environment variables cannot be set.

    Args:
        environment: value by name.
        where: dotted key of the table.
    """

    def check(name: str) -> list[str]:
        value = environment[name]
        if not _VARIABLE.fullmatch(name):
            return [f"{where}.{name}: {name!r} is no name of an environment variable"]
        if name in OWN_VARIABLES or name.startswith("SLURM_"):
            return [f"{where}.{name}: is set by SLURM and the launcher; leave it out"]
        return [f"{where}.{name}: {value!r} holds a zero byte"] if "\0" in value else []

    return collect_problems(*(partial(check, name) for name in environment))
