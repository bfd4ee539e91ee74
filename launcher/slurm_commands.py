"""From a cluster file to exact commands of SLURM: options of sbatch, and srun of every life.

Pure functions, like those of `launcher.commands`.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.cluster import ClusterConfig
from launcher.commands import Command, Endpoint, Task, rank_environment, train_argv
from launcher.job import JobFacts


def step_command(
    cluster: ClusterConfig,
    task: Task,
    run_file: str,
    overrides: Sequence[str],
    job: JobFacts,
) -> Command:
    """Return the srun command of one life: all ranks, or one launcher on every node.

    Args:
        cluster: the cluster.
        task: sub-command of mpotrain.
        run_file: run file, an absolute path that all nodes see.
        overrides: `dotted.key=value` lines.
        job: this life.
    """
    if cluster.launcher == "srun":
        argv = train_argv(cluster.rank_interpreter, task, run_file, overrides)
        return srun_command(cluster, job, argv, tasks_per_node=cluster.local_ranks)
    return srun_command(cluster, job, agent_argv(cluster, task, run_file, overrides, job))


def agent_argv(
    cluster: ClusterConfig,
    task: Task,
    run_file: str,
    overrides: Sequence[str],
    job: JobFacts,
) -> tuple[str, ...]:
    """Return the command of the launcher that starts the ranks of one node.

    It is the same on all nodes; each reads its number from SLURM_NODEID.
    """
    restarts = (f"--max-restarts={cluster.lives.worker_restarts}",)
    return (
        cluster.rank_interpreter, "-m", "launcher", "agent", cluster.launcher,
        f"--nodes={','.join(job.nodes)}",
        f"--ranks-per-node={cluster.local_ranks}",
        f"--master={Endpoint(job.master_address, job.master_port)}",
        f"--rendezvous-id={job.rendezvous_id}",
        *(restarts if cluster.launcher == "torchrun" else ()),
        f"--task={task}",
        run_file, *overrides,
    )  # fmt: skip


def srun_command(
    cluster: ClusterConfig,
    job: JobFacts,
    argv: Sequence[str],
    *,
    tasks_per_node: int = 1,
) -> Command:
    """Return the srun command that runs `argv` in the job's allocation, in its container if any.

    Args:
        cluster: the cluster.
        job: this life; the step runs on all its nodes.
        argv: command of every task.
        tasks_per_node: tasks on each node; they share all CPUs that ranks have there.
    """
    container = cluster.container
    cpus = cluster.local_ranks * cluster.cpus_per_rank // tasks_per_node
    nodes = len(job.nodes)
    options = (
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        # Since SLURM 22.05 a step does not inherit it from the job.
        f"--cpus-per-task={max(1, cpus)}",
        "--kill-on-bad-exit=1",
        f"--wait={cluster.lives.srun_wait_seconds}",
        "--export=ALL",
    )
    environment = {
        "MASTER_ADDR": job.master_address,
        "MASTER_PORT": str(job.master_port),
        **rank_environment(cluster),
    }
    inside = container.inside(tuple(argv), job.folder)
    return Command(("srun", *options, *container.step_options(job.folder), *inside), environment)


def sbatch_options(
    cluster: ClusterConfig,
    *,
    name: str,
    log: str,
    folder: str,
    after: str | None = None,
    exclude: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return the options of sbatch for one job.

    Args:
        cluster: the cluster.
        name: name of the job, see `job_name`.
        log: file pattern of the log, see `log_pattern`.
        folder: working directory of the job.
        after: dependency (`afterok:123`); None starts as soon as there is room.
        exclude: nodes not to use beside those of the cluster file.
    """
    tasks = cluster.local_ranks if cluster.launcher == "srun" else 1
    excluded = ",".join([*([cluster.exclude] if cluster.exclude else []), *exclude])
    gpus = str(cluster.gpus_per_node)
    gpu_option = {"gres": f"--gres=gpu:{gpus}", "gpus-per-node": f"--gpus-per-node={gpus}"}
    wanted = {
        "--mem": cluster.memory,
        "--time": cluster.time,
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--qos": cluster.qos,
        "--constraint": cluster.constraint,
        "--reservation": cluster.reservation,
        "--exclude": excluded or None,
    }
    return (
        f"--job-name={name}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cluster.local_ranks * cluster.cpus_per_rank // tasks}",
        *([gpu_option[cluster.gpu_option]] if cluster.gpus_per_node else []),
        *(f"{option}={value}" for option, value in wanted.items() if value is not None),
        # "B:": to the batch script alone, which tells the ranks when it is ready for their end.
        f"--signal=B:USR1@{cluster.lives.warning_seconds}",
        "--requeue" if cluster.lives.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={log}",
        f"--chdir={folder}",
        "--export=ALL",
        # A dependency that can no longer be met would stay in the queue for ever.
        *((f"--dependency={after}", "--kill-on-invalid-dep=yes") if after else ()),
        *cluster.extra,
        "--parsable",
    )


def sbatch_command(
    cluster: ClusterConfig,
    script: str,
    run_file: str,
    cluster_file: str,
    *,
    options: Sequence[str],
    task: Task = "train",
) -> Command:
    """Return the command that submits a run.

    Args:
        cluster: the cluster.
        script: batch script.
        run_file: resolved run file, an absolute path that all nodes see.
        cluster_file: resolved cluster file, likewise.
        options: see `sbatch_options`.
        task: sub-command of mpotrain.
    """
    environment = {"MPOTRAIN_PYTHON": cluster.interpreter}
    if cluster.modules:
        environment["MPOTRAIN_MODULES"] = " ".join(cluster.modules)
    arguments = (run_file, f"--cluster={cluster_file}", f"--task={task}")
    return Command(("sbatch", *options, script, *arguments), environment)
