"""Arguments that several commands of the launcher have: a run, settings laid over it, its task."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_overrides(parser: argparse.ArgumentParser, laid_over: str = "the run file") -> None:
    """Declare `key=value` settings; commands read them wherever they stand.

    Args:
        parser: of the command.
        laid_over: what they are laid over, for the help.
    """
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help=f"settings laid over {laid_over}",
    )


def add_run(
    parser: argparse.ArgumentParser, *, needs_cluster: bool = False, without_cluster: str = ""
) -> None:
    """Declare the run file, its settings, the cluster file and the task.

    Args:
        parser: of the command.
        needs_cluster: whether there must be a cluster file.
        without_cluster: what holds where there is none, for the help.
    """
    parser.add_argument("run", type=Path, metavar="RUN", help="run file (TOML)")
    add_overrides(parser)
    parser.add_argument(
        "--cluster",
        type=Path,
        required=needs_cluster,
        metavar="FILE",
        help=f"cluster file (TOML){without_cluster}",
    )
    parser.add_argument(
        "--task", choices=["train", "tune"], default="train", help="what the run does"
    )
