"""Every file format of GLUE, and what is said of files that are no such thing."""

from pathlib import Path

import numpy as np
import pytest
from unit.tune.glue_files import EXPECTED, LINES, write_lines

from mpotrain.errors import DataError
from mpotrain.tune.task_file import read_task_file
from mpotrain.tune.tasks import FORMATS, TaskFormat


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_glue_is_read_as_it_is_downloaded(
    kind: str, newline: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "train.tsv", LINES[kind], newline=newline)
    examples = read_task_file(path, FORMATS[kind])
    texts, pairs, labels = EXPECTED[kind]
    assert examples.texts == texts
    assert examples.pairs == pairs
    assert examples.labels.dtype == (np.float32 if kind == "stsb" else np.int64)
    assert examples.labels.tolist() == pytest.approx(labels)
    assert examples.num_bad == 0


def test_a_last_line_without_an_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(LINES["sst2"]))
    assert len(read_task_file(path, FORMATS["sst2"])) == 2


def test_the_order_of_columns_is_that_of_their_names(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.tsv", ["label\tnoise\tsentence", "1\tx\tgood"])
    examples = read_task_file(path, FORMATS["sst2"])
    assert (examples.texts, examples.labels.tolist()) == (["good"], [1])


def test_own_columns_and_classes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.tsv", ["a\tb\tc", "u\tv\tyes", "w\tx\tmaybe"])
    form = TaskFormat("b", "a", "c", ("no", "maybe", "yes"), ("accuracy",))
    examples = read_task_file(path, form)
    assert (examples.texts, examples.pairs) == (["v", "x"], ["u", "w"])
    assert examples.labels.tolist() == [2, 1]


def damaged(kind: str, line: str, tmp_path: Path) -> str:
    lines = LINES[kind]
    path = write_lines(tmp_path / "train.tsv", [*lines[:-1], line, lines[-1]])
    with pytest.raises(DataError) as caught:
        read_task_file(path, FORMATS[kind])
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "line", "words"),
    [
        ("sst2", "no label here", ["line 3", "1 columns instead of 2"]),
        ("sst2", "", ["line 3", "1 columns instead of 2"]),
        ("sst2", "a\tb\t1", ["line 3", "3 columns instead of 2"]),
        ("sst2", "fine\t2", ["line 3", "label is '2', not one of 0, 1"]),
        ("cola", "gj04\t\t\tNo mark.", ["line 2", "label is ''"]),
        ("rte", "7\ta\tb\tentail", ["line 3", "not one of entailment, not_entailment"]),
        ("stsb", "\t".join(["x"] * 9 + ["five"]), ["line 3", "score is 'five', not a number"]),
        ("stsb", "\t".join(["x"] * 9 + ["nan"]), ["line 3", "score is 'nan', not a number"]),
        ("stsb", "\t".join(["x"] * 9 + ["1_0"]), ["line 3", "score is '1_0', not a number"]),
    ],
)
def test_bad_lines_are_named(kind: str, line: str, words: list[str], tmp_path: Path) -> None:
    message = damaged(kind, line, tmp_path)
    for word in [str(tmp_path / "train.tsv"), *words, "task.max_bad_lines=1"]:
        assert word in message


def test_bad_lines_within_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [*LINES["qqp"], "torn", "1\t2\t3\tAgain?\tYes?\t1"]
    path = write_lines(tmp_path / "train.tsv", lines)
    examples = read_task_file(path, FORMATS["qqp"], max_bad_lines=1)
    assert (len(examples), examples.num_bad) == (3, 1)
    assert examples.texts[-1] == "Again?"


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.tsv", [LINES["sst2"][0]] + ["bad"] * 9)
    with pytest.raises(DataError, match="and 4 more bad lines"):
        read_task_file(path, FORMATS["sst2"], max_bad_lines=8)


def test_a_test_file_without_labels_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "test.tsv", ["index\tsentence", "0\tfine"])
    with pytest.raises(DataError, match=r"line 1: no column 'label'.*without labels"):
        read_task_file(path, FORMATS["sst2"])


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.tsv", ["sentence\tlabel\tlabel", "a\t1\t0"])
    with pytest.raises(DataError, match="names 'label' twice"):
        read_task_file(path, FORMATS["sst2"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no column 'sentence'"),
        (b"sentence\tlabel\n", "holds no example"),
        (b"sentence\tlabel\n\xff\xfe\t1\n", "is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_files_that_hold_nothing_are_refused(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_task_file(path, FORMATS["sst2"])
