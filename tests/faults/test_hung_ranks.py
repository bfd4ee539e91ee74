"""Ranks that hang say where they stand and end, and the next start goes on; slow ones do not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_process import curve, environment, free_port, prepare_markov, train, write_run

from mpotrain.errors import EXIT_CRASH, EXIT_HUNG

SCRIPT = Path(__file__).with_name("hung_run.py")
ENGINE = "engine={kind='deepspeed', zero_stage=1}"
PATIENCE = 400.0
"""Seconds after which a test on a loaded machine gives up."""


class Ranks:
    """Two ranks of a run without a launcher that would end one for the other."""

    def __init__(
        self, folder: Path, data: Path, mode: str, seconds: float, hanging: int, *extra: str
    ) -> None:
        self.run = write_run(folder, data)
        self.folder = folder / "run"
        environ = environment() | {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "RANK_THAT_HANGS": str(hanging),
        }
        arguments = [mode, str(seconds), "train", str(self.run), ENGINE, *extra]
        self.logs = [folder / f"rank-{rank}.log" for rank in range(2)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments],
                stdout=self.logs[rank].open("w"), stderr=subprocess.STDOUT,
                env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip

    def code(self, rank: int) -> int:
        """Wait for the end of a rank."""
        return self.processes[rank].wait(timeout=PATIENCE)

    def text(self) -> str:
        """Return what both ranks have said, for messages."""
        return "\n".join(log.read_text() for log in self.logs)

    def hang(self) -> Path:
        """Return the folder of the one hang."""
        folders = [path for path in (self.folder / "hangs").iterdir() if path.is_dir()]
        assert len(folders) == 1, self.text()
        return folders[0]

    def outcome(self) -> dict[str, object]:
        """Return how the run says that it ended."""
        content: dict[str, object] = json.loads((self.folder / "outcome.json").read_text())
        return content


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens."""
    return prepare_markov(tmp_path_factory.mktemp("tokens") / "data")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[tuple[Any, ...]]:
    """The curve of a run in which nothing hangs."""
    folder = tmp_path_factory.mktemp("straight")
    train(write_run(folder, data), ENGINE, launcher="torchrun", world=2)
    return curve(folder / "run")


@pytest.fixture
def ranks(tmp_path: Path, data: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Ranks as the test's parameters say; none outlives it."""
    started = Ranks(tmp_path, data, *request.param)
    yield started
    for process in started.processes:
        process.kill()
        process.wait()


def waiting(folder: Path, rank: int) -> str:
    """Return what a rank says of the collectives that it waits in."""
    text = (folder / f"rank-{rank}.txt").read_text()
    return text.partition("collectives that have not ended:\n")[2].partition("\n\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stopped"), [(("stop", 6.0, 0), 0), (("stop", 6.0, 1), 1)], indirect=["ranks"]
)
def test_a_stopped_rank_ends_the_others_and_the_next_start_goes_on(
    ranks: Ranks, stopped: int, straight: list[tuple[Any, ...]]
) -> None:
    alive = 1 - stopped
    assert ranks.code(alive) == EXIT_HUNG, ranks.text()
    assert ranks.processes[stopped].poll() is None
    hang, outcome = ranks.hang(), ranks.outcome()
    assert hang.name.endswith("-step3")
    assert {path.name for path in hang.iterdir()} == {
        f"rank-{alive}.txt", f"rank-{alive}.trace.json", "summary.txt",
    }  # fmt: skip
    assert "in: step 4" in (hang / f"rank-{alive}.txt").read_text()
    assert "mpotrain/engine/" in (hang / f"rank-{alive}.txt").read_text()
    assert "gloo:all_reduce number" in waiting(hang, alive)
    detail = outcome.pop("detail")
    assert outcome == {
        "outcome": "failed", "reason": "HUNG", "exit_code": 86, "step": 3, "retry": True,
    }  # fmt: skip
    assert f"no answer from 1 of 2 ranks: {stopped}" in str(detail)
    # A stopped rank that comes back finds itself alone, and must end by itself without a word.
    ranks.processes[stopped].send_signal(signal.SIGCONT)
    assert ranks.code(stopped) in (EXIT_HUNG, EXIT_CRASH), ranks.text()
    assert ranks.outcome()["detail"] == detail
    train(ranks.run, ENGINE, launcher="torchrun", world=2)
    assert curve(ranks.folder) == straight


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("parted", 6.0, 1)], indirect=True)
def test_ranks_in_different_collectives_both_say_so(ranks: Ranks) -> None:
    assert [ranks.code(rank) for rank in range(2)] == [EXIT_HUNG] * 2, ranks.text()
    hang, outcome = ranks.hang(), ranks.outcome()
    assert (outcome["reason"], outcome["step"], outcome["retry"]) == ("HUNG", 3, True)
    assert "no answer" not in str(outcome["detail"])
    assert "in go_wrong" in (hang / "rank-1.txt").read_text()
    assert "(own), Float [3, 4]" in waiting(hang, 1)
    assert "gloo:" in waiting(hang, 0)
    assert "(own), Float [3, 4]" not in waiting(hang, 0)
    for rank in range(2):
        trace = json.loads((hang / f"rank-{rank}.trace.json").read_text())
        entries = trace["recorders"]["other"]["entries"]
        assert len(entries) > 10
        assert any(not entry["retired"] for entry in entries)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("held", 6.0, 1)], indirect=True)
def test_a_rank_that_keeps_the_interpreter_does_not_hold_the_other(ranks: Ranks) -> None:
    assert ranks.code(0) == EXIT_HUNG, ranks.text()
    assert "no answer from 1 of 2 ranks: 1" in str(ranks.outcome()["detail"])
    # Its own timer, which needs no interpreter, ends it a moment later.
    assert ranks.code(1) == EXIT_CRASH
    assert "in go_wrong" in ranks.logs[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks", [("slow", 10.0, 1, "train.stop_after=2", "train.eval_every=1")], indirect=True
)
def test_slow_work_is_no_hang(ranks: Ranks) -> None:
    """Steps and saved tensors of half the timeout each, 25 seconds in all; rank 0 mostly waits."""
    begin = time.monotonic()
    assert [ranks.code(rank) for rank in range(2)] == [0, 0], ranks.text()
    assert time.monotonic() - begin > 25
    assert not (ranks.folder / "hangs").exists()
    assert ranks.outcome()["outcome"] == "held"
    assert (ranks.folder / "pulse").is_file()
