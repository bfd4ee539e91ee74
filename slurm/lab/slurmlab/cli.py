"""The command line: `python slurm/lab COMMAND ...`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from slurmlab import locks
from slurmlab.cluster import Lab, down, lock_of, up
from slurmlab.node_init import run_node
from slurmlab.nodes import INIT_WORD, Node
from slurmlab.settings import Authentication, LabError, Mode, Settings, default_folder

SYSTEM_PROGRAMS = ("/usr/sbin", "/sbin", "/usr/local/sbin")
"""Where daemons live; the PATH of most users lacks them."""

NODES_ALONE = "Needs nodes of their own (mode netns, which needs root)."

NODE_COMMANDS: dict[str, tuple[str, str, Callable[[Node], None]]] = {
    "kill": (
        "power loss: cable dead, then every process killed",
        "Take the power from a node: its network cable goes dead, then every process is killed, so "
        "that nobody hears them end. SLURM declares the node down after --node-timeout seconds of "
        f"silence and requeues its jobs. Undo: start NODE. {NODES_ALONE}",
        Node.kill,
    ),
    "crash": (
        "every process killed, network stays up",
        "Kill every process of a node at once, slurmd included. The network stays, so peers see "
        f"their connections reset. Undo: start NODE. {NODES_ALONE}",
        Node.crash,
    ),
    "start": (
        "boot a node that was killed or crashed",
        "Boot a node that was killed or crashed; does nothing where it runs.",
        Node.boot,
    ),
    "cut": (
        "unplug the network cable",
        "Unplug the network cable of a node: its processes run on, and hear nothing and nobody. "
        f"Undo: heal NODE. {NODES_ALONE}",
        Node.cut,
    ),
    "heal": (
        "plug the network cable in",
        f"Plug in the network cable of a node that was cut. {NODES_ALONE}",
        Node.heal,
    ),
    "freeze": (
        "SIGSTOP every process",
        "Stop every process of a node with SIGSTOP, as a kernel that hangs would: connections stay "
        f"open, nobody answers. Undo: thaw NODE. {NODES_ALONE}",
        Node.freeze,
    ),
    "thaw": (
        "SIGCONT every process",
        f"Let the processes of a frozen node go on (SIGCONT). {NODES_ALONE}",
        Node.thaw,
    ),
    "slurmd-kill": (
        "kill slurmd alone; job steps live on",
        "Kill slurmd, SLURM's daemon of a node, and nothing else: job steps live on. Undo: "
        "slurmd-start NODE.",
        Node.kill_slurmd,
    ),
    "slurmd-start": (
        "start slurmd again",
        "Start slurmd on a node where it was killed; does nothing where it runs.",
        Node.start_slurmd,
    ),
}

LAB_COMMANDS = {
    "down": (
        "stop everything and delete the folder; safe to call twice",
        "Stop every process of the lab, its jobs included, and delete its networks and its folder "
        "with all logs. Also after a crash, and where there is no lab.",
    ),
    "env": (
        "print shell lines that point SLURM's commands to the lab",
        'Print lines for a shell: after eval "$(python slurm/lab env)" the commands of SLURM '
        "(sbatch, srun, squeue, ...) in that shell talk to the lab.",
    ),
    "status": ("show nodes and queue", "Show the nodes (sinfo) and the queue (squeue) of the lab."),
    "mend": (
        "undo every fault that was played and wait for all nodes",
        "Undo every fault that was played: boot, thaw and plug in all nodes, start slurmctld and "
        "every slurmd that is gone, and wait until all nodes are ready. Jobs stay.",
    ),
}

EPILOG = """\
Begin:   sudo slurm/lab/install.sh           installs SLURM and munge (Debian, Ubuntu)
         sudo -s                             nodes of their own need root
         python slurm/lab up 3
         eval "$(python slurm/lab env)"
         srun --nodes=3 hostname
End:     python slurm/lab down

Without root there are only nodes that share host and network (up --mode multi): jobs, time limits,
requeues and pre-emption work; kill, crash, cut, heal, freeze, thaw and exec are refused.
A command of its own shows its arguments: python slurm/lab up --help. All of it: docs/slurm-lab.md.
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_PROGRAMS])
    os.environ.pop("SLURM_CONF", None)  # of another cluster, or of a lab long gone
    if list(arguments[:1]) == [INIT_WORD]:
        run_node(Path(arguments[1]), int(arguments[2]))
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # a lab half started is then taken down, as at Ctrl-C
    try:
        return int(options.run(options) or 0)
    except LabError as error:
        print(f"slurm lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("slurm lab: interrupted", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python slurm/lab",
        description="A real SLURM cluster of virtual nodes (node1, node2, ...) on this machine, "
        "and faults to play on it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="folder of the lab, of at most 60 characters; stands before the command (default: "
        "$LAB_DIR, else one for each user); labs in different folders do not meet",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_up(commands)
    runs = {"down": _down, "env": _env, "status": _status, "mend": _mend}
    for name, (text, description) in LAB_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=description)
        command.set_defaults(run=runs[name])
    for name, (text, description, action) in NODE_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=description)
        command.add_argument("node", metavar="NODE", help="name of the node: node1, node2, ...")
        command.set_defaults(run=_node_command, action=action)
    _add_execute(commands)
    _add_restart(commands)
    return parser


def _add_execute(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "exec",
        help="run a command inside a node",
        description="Run a command inside a node, beside SLURM: with its network, host name and "
        "processes, in this folder, with this shell's variables. Ends with the exit code of the "
        f"command. {NODES_ALONE}",
    )
    command.add_argument("node", metavar="NODE", help="name of the node: node1, node2, ...")
    command.add_argument(
        "argv",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="program and arguments, say: ip address",
    )
    command.set_defaults(run=_execute)


def _add_restart(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "ctl-restart",
        help="stop and start slurmctld; jobs run on",
        description="Stop slurmctld, SLURM's controller, and start it again. Jobs run on; commands "
        "of SLURM fail or wait in between.",
    )
    command.add_argument(
        "signal",
        nargs="?",
        default="TERM",
        choices=["TERM", "KILL"],
        help="TERM (default) lets it save its state; after KILL it may come back with an older one",
    )
    command.set_defaults(run=_restart)


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "up",
        help="start a lab and print what `env` prints",
        description="Start a cluster of N nodes, wait until all are ready (seconds), and print the "
        "lines of `env`. Does nothing where just this cluster runs and is well; one of another "
        "shape is taken down first. Timers are short so that tests need not wait.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plain = Settings()
    command.add_argument(
        "num_nodes", nargs="?", type=int, default=2, metavar="N", help="number of nodes"
    )
    command.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="netns" if os.geteuid() == 0 else "multi",
        help="netns: every node has namespaces of its own (needs root); "
        "multi: daemons side by side on one host, for any user, nothing to kill or cut",
    )
    command.add_argument(
        "--auth",
        choices=get_args(Authentication),
        default="munge",
        help="how SLURM knows who asks: munge with a key of the lab, or none where it is missing",
    )
    for name, metavar, text in (
        ("cpus", "N", "CPUs a node claims to have"),
        ("memory", "MIB", "MiB a node claims to have"),
        ("gpus", "N", "pretended GPUs of a node; scheduled, but nothing computes on them"),
        ("node_timeout", "S", "seconds of silence until a node is DOWN (SlurmdTimeout)"),
        ("kill_wait", "S", "seconds from SIGTERM to SIGKILL at the time limit (KillWait)"),
        ("requeue_delay", "S", "seconds until a requeued job may start again, at least 5"),
        ("grace", "S", "seconds from SIGTERM to SIGKILL for a pre-empted job (GraceTime)"),
    ):
        option = "--" + name.replace("_", "-")
        default = getattr(plain, name)
        command.add_argument(option, type=int, default=default, metavar=metavar, help=text)
    command.add_argument(
        "--conf-extra",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="file with more lines for slurm.conf",
    )
    command.set_defaults(run=_up)


def _folder(options: argparse.Namespace) -> Path:
    return options.dir if options.dir is not None else default_folder()


def _up(options: argparse.Namespace) -> None:
    names = {field.name for field in dataclasses.fields(Settings)} - {"extra"}
    extra: tuple[str, ...] = ()
    more: Path | None = getattr(options, "conf_extra", None)
    if more is not None:
        try:
            extra = tuple(more.read_text(encoding="utf-8").splitlines())
        except OSError as error:
            raise LabError(f"--conf-extra {more}: {error.strerror}") from error
    chosen = {name: value for name, value in vars(options).items() if name in names}
    lab = up(_folder(options), Settings(**chosen, extra=extra))
    print(lab.exports())


def _down(options: argparse.Namespace) -> None:
    down(_folder(options))


def _env(options: argparse.Namespace) -> None:
    print(Lab.open(_folder(options)).exports())


def _status(options: argparse.Namespace) -> None:
    print(Lab.open(_folder(options)).status(), end="")


def _mend(options: argparse.Namespace) -> None:
    lab = Lab.open(_folder(options))
    with locks.held(lock_of(lab.place.folder)):
        lab.mend()


def _node_command(options: argparse.Namespace) -> None:
    lab = Lab.open(_folder(options))
    node = lab.node(options.node)
    with locks.held(lock_of(lab.place.folder)):
        options.action(node)


def _execute(options: argparse.Namespace) -> None:
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        raise LabError("exec needs a command: exec NODE COMMAND ...")
    Lab.open(_folder(options)).node(options.node).execute(argv)


def _restart(options: argparse.Namespace) -> None:
    lab = Lab.open(_folder(options))
    number = signal.Signals[f"SIG{options.signal}"]
    with locks.held(lock_of(lab.place.folder)):
        lab.restart_controller(number)
