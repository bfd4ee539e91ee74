"""`python -m launcher slurm`: check a run against a cluster and queue it."""

from __future__ import annotations

import argparse

from launcher.dry_run import shell_text
from launcher.job import JobFacts, master_port
from launcher.launch_folder import LaunchFolder
from launcher.run_arguments import add_run
from launcher.saved_run import refuse_finished
from launcher.slurm_commands import step_command
from launcher.submission import (
    Request,
    Submission,
    describe,
    prepare,
    rehearse,
    submit,
    train_script,
)
from mpotrain.errors import EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_run(parser, needs_cluster=True)
    parser.add_argument("--name", help="name of the job (default: that of the run)")
    parser.add_argument(
        "--after",
        metavar="JOBID[:ok|any],...",
        help="begin when other jobs have ended, well (default) or anyhow",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done; write and queue nothing"
    )


def main(options: argparse.Namespace) -> int:
    """Queue a run, or show what would be queued.

    Raises:
        MpotrainError: it cannot be submitted (nothing was queued), or could not be.
    """
    submission = prepare(
        Request(
            run_file=options.run,
            cluster_file=options.cluster,
            overrides=tuple(options.overrides),
            task=options.task,
            # argparse makes an empty list of `--name=--`.
            name=options.name or None,
            after=options.after or None,
        )
    )
    for note in submission.plan.notes:
        print(f"note: {note}")
    if options.dry_run:
        print(dry_run_text(submission), flush=True)
        for note in rehearse(submission):
            print(f"note: {note}")
        return EXIT_DONE
    refuse_finished(submission.run, submission.folder)
    print(describe(submission, submit(submission)))
    return EXIT_DONE


def dry_run_text(submission: Submission) -> str:
    """Return everything that a submission would do, as a shell would take it."""
    launch = LaunchFolder(submission.folder)
    nodes = tuple(f"NODE{number}" for number in range(submission.cluster.nodes))
    folder = str(submission.working_folder)
    job = JobFacts("JOBID", 0, nodes, "ADDRESS_OF_NODE0", master_port("", 0), folder)
    step = step_command(submission.cluster, submission.task, str(launch.run_file), (), job)
    script = train_script()
    return "\n".join(
        [
            f"# {submission.plan.summary}",
            f"# would write {launch.run_file}, {launch.cluster_file}, ...",
            f"# in {submission.working_folder}:",
            shell_text(submission.command),
            "",
            f"# {script}:",
            script.read_text(encoding="utf-8").rstrip(),
            "",
            "# in each life, once the nodes have passed their check (preflight):",
            shell_text(step),
        ]
    )
