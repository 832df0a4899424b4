"""benchmarks/reader.py: a row of every way to read, and what it counts."""

import json


def test_a_row_of_each_way_to_read(call_program, tmp_path):
    code, said, errors = call_program(
        "benchmarks/reader.py", "--tokens", 2e5, "--repeats", 1, "--output", tmp_path / "reader.json"
    )
    assert code == 0, errors
    found = json.loads((tmp_path / "reader.json").read_text())["rows"]
    ways = [(row["settings"]["documents"], row["method"], row["sources"], row["share"]) for row in found]
    assert len(set(ways)) == len(ways) == len(said.splitlines()) - 1 == 30
    for row in found:
        assert row["tokens_per_second"] > 0 and row["settings"]["context"] == 8192
        if row["method"] == "best_fit":
            assert row["cut_fraction"] == (None if row["settings"]["documents"] == "100,000" else 0)
            assert row["padding_fraction"] < 0.13  # one sequence of the eight that are read, in so small a folder
        elif row["method"] != "memmap":
            assert row["padding_fraction"] == 0
