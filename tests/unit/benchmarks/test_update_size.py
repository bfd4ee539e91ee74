"""Scaled auxiliary tensors keep the first step of a deep network small."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.update_size import encoder_table, linear_table, main, ratio, text_table


def test_scaling_makes_the_change_of_48_layers_ten_times_smaller() -> None:
    rows = linear_table((3, 48), (0, 1, 2))
    assert ratio(rows, 48) > 10
    assert ratio(rows, 3) < 3  # a shallow network needs none
    unscaled = [row.change for row in rows if row.scale == "none"]
    assert unscaled[1] > 20 * unscaled[0]  # grows with the depth where nothing is scaled


def test_scaling_holds_for_whole_encoders() -> None:
    rows = encoder_table((3, 24), (0,))
    change = {(row.scale, row.depth): row.change for row in rows}
    assert change["none", 24] > 2 * change["none", 3]
    assert change["per_side", 24] <= change["per_side", 3]
    assert change["per_tensor", 24] < 0.1 * change["per_side", 24]


def test_tables_have_a_line_for_each_scaling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.update_size.DEPTHS", (3, 48))
    monkeypatch.setattr("benchmarks.update_size.ENCODER_DEPTHS", (3,))
    monkeypatch.setattr("benchmarks.update_size.SEEDS", (0,))
    monkeypatch.setattr("sys.argv", ["update_size", "--out", str(tmp_path / "out.json")])
    main()
    printed = capsys.readouterr().out
    for word in ("linear", "encoder", "per_side", "per_tensor", "L = 48", "times less"):
        assert word in printed
    rows = linear_table((3,), (0,))
    assert len(text_table(rows).splitlines()) == 3
    assert (tmp_path / "out.json").read_text(encoding="utf-8").count('"change"') == 4 + 3
