"""Bad input through the command line: a clear message, the right exit code, no half files."""

import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from run_process import command, environment, prepare_markov, train, write_run

from mpotrain.cli import main
from mpotrain.errors import EXIT_BAD_INPUT, EXIT_STORAGE


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_markov(tmp_path_factory.mktemp("data") / "data")


def _truncate(folder: Path) -> None:
    path = folder / "shard-00000.bin"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _remove(folder: Path) -> None:
    (folder / "shard-00000.idx").unlink()


def _unfinished(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, ["shard-00000.bin", "truncated"]),
        (_remove, ["shard-00000.idx", "missing"]),
        (_unfinished, ["manifest.json", "mpotrain prepare"]),
        (shutil.rmtree, ["is not a folder"]),
    ],
)
def test_damaged_data_are_refused_by_name(
    damage: Callable[[Path], None],
    words: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    run = write_run(tmp_path / "r", copy)
    damage(copy)
    assert main(["train", str(run)]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert all(word in message for word in [str(copy), *words]), message
    assert not (tmp_path / "r" / "run" / "checkpoints").exists()


def test_a_changed_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the number {n} and the word w{n * 7}" for n in range(3000)))
    out = tmp_path / "data"
    arguments = ["prepare", str(text), "--out", str(out), "--per-line", "--vocab-size", "400",
                 "--workers", "0"]  # fmt: skip
    assert main(arguments) == 0
    tokenizer = out / "tokenizer.model"
    content = bytearray(tokenizer.read_bytes())
    content[len(content) // 2] ^= 1
    tokenizer.write_bytes(content)
    run = write_run(tmp_path / "r", out)
    assert main(["train", str(run), "model.vocab_size=400"]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "tokenizer.model" in message
    assert "changed" in message


def test_disk_full_while_saving_leaves_the_checkpoint_before(data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, data)
    folder = tmp_path / "run" / "checkpoints"
    train(run, "train.stop_after=5")
    good = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    size = (folder / "step-00000005" / "rank-00000-part-00000.safetensors").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    import signal

    def setup() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit()

    done = subprocess.run(
        command("alone", 1, ["train", str(run)]),
        capture_output=True, text=True, env=environment(), check=False, preexec_fn=setup,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == EXIT_STORAGE, done.stderr
    assert "the checkpoint of step 10 was not written; earlier ones are intact" in done.stderr
    assert "Traceback" not in done.stderr
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".writer"}
    assert kept == {path: content for path, content in good.items() if path.name != ".writer"}
    assert (tmp_path / "run" / "outcome.json").read_text().startswith('{"outcome": "failed"')
    again = train(run)
    assert "resuming tiny at step 5 of 20" in again.stderr


def test_disk_full_while_preparing_leaves_nothing_that_counts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of the text" for n in range(20_000)))
    out = tmp_path / "data"
    arguments = ["prepare", str(text), "--out", str(out), "--per-line", "--vocab-size", "400",
                 "--workers", "0"]  # fmt: skip

    def setup() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = subprocess.run(
        command("alone", 1, arguments), capture_output=True, text=True, env=environment(),
        check=False, preexec_fn=setup, timeout=240,
    )  # fmt: skip
    assert done.returncode == EXIT_STORAGE, done.stderr
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("*.bin"))
    again = subprocess.run(
        command("alone", 1, arguments), capture_output=True, text=True, env=environment(),
        check=False, timeout=240,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr


def test_a_corrected_command_takes_over_a_folder_that_failed_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("id,body\n" + "\n".join(f"{n},text number {n}" for n in range(2000)))
    out = tmp_path / "data"
    arguments = ["prepare", str(table), "--out", str(out), "--vocab-size", "320", "--workers", "0"]
    assert main(arguments) == EXIT_BAD_INPUT
    assert "body" in capsys.readouterr().err
    assert main([*arguments, "--text-column", "body"]) == 0
    assert main([*arguments, "--text-column", "id"]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "text_column: body before, id now" in message
    assert "{" not in message


def test_options_are_called_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "x.txt", "--out", "y", "--vocab-size", "0", "--workers", "-2"]
    assert main(arguments) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "command line: --vocab-size: is 0" in message
    assert "command line: --workers: is -2" in message
