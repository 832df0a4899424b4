"""Rows of finished runs: appended, read again, whatever an earlier process left."""

import pytest

from lcpt.data import DataError
from lcpt.evaluation.result_rows import append_row, has_row, read_rows
from lcpt.evaluation.variants import read_variants


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new/rows.jsonl"
    assert read_rows(path) == []
    append_row(path, {"variant": "a", "seed": 0, "loss": 0.1})
    append_row(path, {"variant": "a", "seed": 1, "loss": 0.2})
    rows = read_rows(path)
    assert [row["loss"] for row in rows] == [0.1, 0.2]
    assert has_row(rows, variant="a", seed=1) and not has_row(rows, variant="a", seed=2)


def test_a_half_written_row_is_named_and_spoils_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}\n{"seed"')  # killed
    append_row(path, {"seed": 1})
    assert path.read_text() == '{"seed": 0}\n{"seed"\n{"seed": 1}\n'
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2 is no JSON; remove that line"):
        read_rows(path)


def test_variants_are_names_and_overrides(tmp_path):
    path = tmp_path / "variants.txt"
    path.write_text("# a comment\n\none   a.b=1 c=2\ntwo\n")
    assert read_variants(path) == {"one": ["a.b=1", "c=2"], "two": []}
    assert read_variants(path, ["two"]) == {"two": []}
    with pytest.raises(DataError, match="there is no three in .*; there are one, two"):
        read_variants(path, ["one", "three"])
