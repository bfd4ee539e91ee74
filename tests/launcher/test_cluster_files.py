"""Cluster files: every shipped one is sound, and every mistake is told with file and key."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_fakes import ROOT

from launcher.cluster import ClusterConfig, dump_cluster, load_cluster
from launcher.containers import ApptainerContainer, PyxisContainer
from launcher.slurm_time import seconds_of
from mpotrain.errors import ConfigError

FILES = sorted((ROOT / "configs" / "clusters").glob("*.toml"))


def problems_of(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert all(line.startswith(f"{path}: ") for line in caught.value.problems)
    return [line.removeprefix(f"{path}: ") for line in caught.value.problems]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_reads_back_equal(path: Path, tmp_path: Path) -> None:
    cluster = load_cluster(path)
    (tmp_path / "again.toml").write_text(dump_cluster(cluster))
    again = load_cluster(tmp_path / "again.toml")
    assert again == replace(cluster, python=cluster.interpreter)
    assert again.python is not None


def test_all_fields_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        """
        nodes = 3
        gpus_per_node = 8
        ranks_per_node = 4
        time = "2-00"
        extra = ["--licenses=scratch:1", "--exclusive"]
        modules = ["cuda/12.8"]
        python = "/opt/a b/python"
        environment = { A = "x y", B = "$(touch z)", C = "line\\nline" }
        container = { kind = "apptainer", image = "i.sif", binds = ["/a:/b"], options = ["--nv"] }
        lives = { restart = "resubmit", requeue = false }
        preflight = { enabled = false }
        """
    )
    cluster = load_cluster(path)
    (tmp_path / "again.toml").write_text(dump_cluster(cluster))
    assert load_cluster(tmp_path / "again.toml") == cluster
    assert cluster.world_size == 12
    assert cluster.environment["C"] == "line\nline"


@pytest.mark.parametrize(
    ("ranks", "gpus", "expected"), [(None, 0, 1), (None, 8, 8), (4, 8, 4), (6, 0, 6)]
)
def test_ranks_of_a_node(ranks: int | None, gpus: int, expected: int) -> None:
    cluster = ClusterConfig(nodes=3, ranks_per_node=ranks, gpus_per_node=gpus)
    assert cluster.local_ranks == expected
    assert cluster.world_size == 3 * expected


def test_form_mistakes_come_together(tmp_path: Path) -> None:
    text = "nodes = 'two'\npartitoin = 'main'\n[lives]\nmax_live = 3\n[container]\nkind = 'pyxis'\n"
    found = problems_of(tmp_path, text)
    assert len(found) == 4
    assert any(
        line.startswith("partitoin: unknown key; did you mean 'partition'") for line in found
    )
    assert any(line.startswith("lives.max_live: unknown key") for line in found)
    assert any(line.startswith("container.image: required") for line in found)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("nodes = 0", "nodes"),
        ("gpus_per_node = -1", "gpus_per_node"),
        ("ranks_per_node = 0", "ranks_per_node"),
        ("gpus_per_node = 2\nranks_per_node = 4", "ranks_per_node"),
        ("cpus_per_rank = 0", "cpus_per_rank"),
        ("partition = ''", "partition"),
        ("account = 'a\\u0000'".replace("'", '"'), "account"),
        ('qos = "a\\nb"', "qos"),
        ("python = ' '", "python"),
        ("memory = '64 GB'", "memory"),
        ("memory = '1.5G'", "memory"),
        ("memory = '64X'", "memory"),
        ("memory = '-1'", "memory"),
        ("exclude = 'node[3-4'", "exclude"),
        ("exclude = 'node[a-b]'", "exclude"),
        ("exclude = '/home/me/bad-nodes'", "exclude"),
        ("exclude = 'node1;node2'", "exclude"),
        ("time = '1 day'", "time"),
        ("time = '0'", "time"),
        ("time = '2'", "time"),  # 120 s, as long as the warning before its end
        ("extra = ['-p main']", "extra[0]"),
        ("extra = ['--ok', '--output=x']", "extra[1]"),
        ("extra = ['--wrap=touch x']", "extra[0]"),
        ("extra = ['--array=1-3']", "extra[0]"),
        ("modules = ['$(touch x)']", "modules[0]"),
        ("modules = ['a', '-x']", "modules[1]"),
        ("modules = ['a b']", "modules[0]"),
        ("[environment]\n'A B' = 'x'", "environment.A B"),
        ("[environment]\nSLURM_NTASKS = '4'", "environment.SLURM_NTASKS"),
        ("[environment]\nRANK = '4'", "environment.RANK"),
        ('[environment]\nA = "\\u0000"', "environment.A"),
        ("[lives]\nwarning_seconds = 0\ngrace_seconds = 0", "lives.warning_seconds"),
        ("[lives]\nwarning_seconds = 70000", "lives.warning_seconds"),
        ("[lives]\ngrace_seconds = 121", "lives.grace_seconds"),
        ("[lives]\nmax_lives = 0", "lives.max_lives"),
        ("[lives]\nlives_without_progress = 0", "lives.lives_without_progress"),
        ("[lives]\nworker_restarts = 1", "lives.worker_restarts"),
        ("[preflight]\nmin_free_gib = -1.0", "preflight.min_free_gib"),
        ("[preflight]\ntimeout_seconds = 0", "preflight.timeout_seconds"),
        ("container = { kind = 'apptainer', image = '' }", "container.image"),
        ("container = { kind = 'apptainer', image = '--x' }", "container.image"),
        ("container = { kind = 'apptainer', image = 'i', options = ['nv'] }", "container.options"),
        ("container = { kind = 'apptainer', image = 'i', binds = [''] }", "container.binds[0]"),
        ("container = { kind = 'pyxis', image = 'i', mounts = ['/a,/b'] }", "container.mounts[0]"),
        ("container = { kind = 'pyxis', image = 'i', python = '' }", "container.python"),
        ("python = '~/venv/bin/python'", "python"),
        ("python = '$HOME/venv/bin/python'", "python"),
        ("container = { kind = 'apptainer', image = '~/i.sif' }", "container.image"),
        ("container = { kind = 'pyxis', image = '${HOME}/i.sqsh' }", "container.image"),
        ("container = { kind = 'pyxis', image = 'i', python = '~/p' }", "container.python"),
        (
            "container = { kind = 'apptainer', image = 'i', binds = ['/a', '~/b'] }",
            "container.binds[1]",
        ),
        (
            "container = { kind = 'apptainer', image = 'i', binds = ['/a:$HOME'] }",
            "container.binds[0]",
        ),
        (
            "container = { kind = 'pyxis', image = 'i', mounts = ['~:/home'] }",
            "container.mounts[0]",
        ),
    ],
)
def test_content_mistakes(tmp_path: Path, text: str, key: str) -> None:
    found = problems_of(tmp_path, text)
    assert any(line.startswith(key) for line in found), found


def test_paths_and_addresses_that_need_no_shell() -> None:
    """The user of NVIDIA's registry has a dollar in its name; editors leave files with a tilde."""
    image = "docker://$oauthtoken@nvcr.io#nvidia/pytorch:25.01-py3"
    container = PyxisContainer(image=image, mounts=("/data/a~:/data:ro",))
    assert ClusterConfig(python="/opt/a b~/python", container=container).problems() == []


def test_content_mistakes_come_together(tmp_path: Path) -> None:
    found = problems_of(tmp_path, "nodes = 0\ntime = 'soon'\n[lives]\nmax_lives = 0")
    assert len(found) == 3


def test_mistakes_of_form_and_content_come_together(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        """
        nodes = 0
        gpus_per_node = "8"
        ranks_per_node = 16
        time = "2"
        exclude = "node["
        [container]
        kind = "pyxis"
        [environment]
        RANK = "1"
        [lives]
        warning_seconds = "300"
        max_lives = 0
        """,
    )
    keys = [line.partition(":")[0] for line in found]
    # No word of sixteen ranks or two minutes: what they are held against could not be read.
    assert sorted(keys) == [
        "container.image", "environment.RANK", "exclude", "gpus_per_node", "lives.max_lives",
        "lives.warning_seconds", "nodes",
    ]  # fmt: skip


def test_a_key_of_a_dropped_section_is_not_taken_for_another(tmp_path: Path) -> None:
    text = "python = ''\n[container]\nkind = 'pyxis'\npython = 3\n"
    found = problems_of(tmp_path, text)
    assert [line.partition(":")[0] for line in found] == [
        "python", "container.image", "container.python",
    ]  # fmt: skip


@pytest.mark.parametrize("memory", ["0", "64G", "4000M", "512000", "64gb", "1T"])
def test_memory(memory: str) -> None:
    assert ClusterConfig(memory=memory).problems() == []


@pytest.mark.parametrize("nodes", ["node[3-4],node9", "cpu[013,117]", "r[0-3]n[0-7]-ib", "a.b, c"])
def test_node_lists(nodes: str) -> None:
    assert ClusterConfig(exclude=nodes).problems() == []


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, expected in {
        "elsewhere/c.toml": "elsewhere/c.toml: does not exist; name a cluster file (TOML)",
        "cpu": f"cpu: does not exist; did you mean {ROOT}/configs/clusters/cpu.toml?",
        "cpu.toml": f"cpu.toml: does not exist; did you mean {ROOT}/configs/clusters/cpu.toml?",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_cluster(Path(name))
        assert str(caught.value) == expected
    with pytest.raises(ConfigError) as caught:
        load_cluster(Path("my-cluster"))
    assert all(path.name in str(caught.value) for path in FILES)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("2-00", 172800),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
        ("", None),
        ("4h", None),
        ("1:2:3:4", None),
        ("-5", None),
        ("1-", None),
        ("٣", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z_]{1,8}", fullmatch=True),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")),
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_any_text_survives_the_dump(environment: dict[str, str], account: str) -> None:
    cluster = ClusterConfig(environment=environment, account=account, python="p")
    read = tomllib.loads(dump_cluster(cluster))
    assert read["environment"] == environment
    assert read["account"] == account


def test_interpreter_of_a_container_is_its_own() -> None:
    inside = ApptainerContainer(image="i.sif", python="/opt/python")
    cluster = ClusterConfig(python="/usr/bin/python3", container=inside)
    assert (cluster.interpreter, cluster.rank_interpreter) == ("/usr/bin/python3", "/opt/python")
    pyxis = ClusterConfig(python="/p", container=PyxisContainer(image="i"))
    assert pyxis.rank_interpreter == "python3"
    assert ClusterConfig(python="/p").rank_interpreter == "/p"


def test_ranks_have_the_time_that_the_warning_leaves(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    for lines, seconds in (
        ("", 90),
        ("[lives]\nwarning_seconds = 1800", 1770),
        ("[lives]\nwarning_seconds = 20", 1),
        ("[lives]\nwarning_seconds = 1800\ngrace_seconds = 60", 60),
    ):
        path.write_text(lines)
        assert load_cluster(path).lives.seconds_to_save == seconds
