"""The command line of the pre-flight (no torch)."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpotrain.errors import ConfigError
from mpotrain.preflight.options import (
    CHECKS,
    DEFAULT_CLOCK_SKEW,
    DEFAULT_TIMEOUT,
    PreflightOptions,
)

DESCRIPTION = (
    "Check all nodes before a long job: GPUs, disks, clocks, versions, all-reduces inside and "
    "between nodes. Start it as the job itself will be started: under srun, torchrun or alone. "
    "Exits with 2 and names the bad nodes."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mpotrain preflight` to its parser."""
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the reports, shared by all nodes",
    )
    parser.add_argument(
        "--run-folder",
        type=Path,
        metavar="DIR",
        help="where the run will write; its disk is measured (default: --out)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--expect-gpus",
        type=int,
        metavar="N",
        help="GPUs of every node (default: as many as most nodes have)",
    )
    _add_limits(parser)
    parser.add_argument(
        "--timeout-seconds",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="X",
        help=f"there is an answer after this time, whatever hangs (default {DEFAULT_TIMEOUT:g})",
    )
    parser.add_argument(
        "--skip",
        action="append",
        choices=CHECKS,
        default=[],
        metavar="NAME",
        help=f"leave a check out: {', '.join(CHECKS)}; may be repeated",
    )
    parser.add_argument(
        "--nodes",
        default="",
        metavar="NAME,...",
        help="names of the nodes in their order, so that one that never answers has a name "
        "(default: those of the SLURM step)",
    )
    parser.add_argument(
        "--per-node-start",
        action="store_true",
        help="the command is started on every node of --nodes by itself (one srun each), so that "
        "a node on which it cannot start is named instead of failing the start of all",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def options_of(namespace: argparse.Namespace) -> PreflightOptions:
    """Return the options of a parsed command line.

    Raises:
        ConfigError: values that cannot be.
    """
    options = PreflightOptions(
        out=namespace.out.absolute(),
        run_folder=None if namespace.run_folder is None else namespace.run_folder.absolute(),
        device=namespace.device,
        expect_gpus=namespace.expect_gpus,
        min_gpu_gib=namespace.min_gpu_gib,
        min_free_gib=namespace.min_free_gib,
        min_write_mib_per_s=namespace.min_write_mib_per_s,
        min_bandwidth_gib_per_s=namespace.min_bandwidth_gib_per_s,
        max_clock_skew_seconds=namespace.max_clock_skew_seconds,
        timeout_seconds=namespace.timeout_seconds,
        skip=frozenset(namespace.skip),
        nodes=tuple(name.strip() for name in namespace.nodes.split(",") if name.strip()),
        per_node_start=namespace.per_node_start,
    )
    if problems := options.problems():
        raise ConfigError([f"command line: {line}" for line in problems])
    return options


def _add_limits(parser: argparse.ArgumentParser) -> None:
    _add_limit(parser, "--min-gpu-gib", "GiB that every GPU must have free")
    _add_limit(parser, "--min-free-gib", "GiB that must be free where the run folder lies")
    _add_limit(parser, "--min-write-mib-per-s", "speed of every node into the run folder")
    _add_limit(
        parser,
        "--min-bandwidth-gib-per-s",
        "bus bandwidth of all-reduces in a node and between two nodes",
    )
    parser.add_argument(
        "--max-clock-skew-seconds",
        type=float,
        default=DEFAULT_CLOCK_SKEW,
        metavar="X",
        help=f"largest difference of clocks (default {DEFAULT_CLOCK_SKEW:g}; 0 = no limit)",
    )


def _add_limit(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, type=float, default=0.0, metavar="X", help=f"{text} (default: any)")
