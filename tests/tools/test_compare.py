"""tools/compare.py on two runs that never were: the tables, the files and the pictures."""

import json

import pytest
import yaml

PNG = b"\x89PNG\r\n"


@pytest.fixture
def runs(tmp_path):
    folders = [tmp_path / "softmax", tmp_path / "polysketch"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.yaml").write_text(
            yaml.safe_dump(
                {
                    "run": {"dir": "unused", "seed": 0},
                    "model": {
                        "n_layers": 1,
                        "d_model": 16,
                        "n_heads": 2,
                        "vocab_size": 10,
                        "attention": {"kind": folder.name},
                    },
                    "data": {"path": "somewhere", "valid_path": None, "context": 64},
                    "training": {"global_batch_tokens": 100, "valid_tokens": 64, "precision": "fp32"},
                }
            )
        )
        rows = [{"step": n, "tokens": 100 * n, "loss": 5.0 - n, "step_seconds": 0.25} for n in range(1, 4 + number)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text("{}")
        (folder / "evaluation.json").write_text(
            json.dumps(
                {
                    "loss": 3.5,
                    "bits_per_byte": 2.5,
                    "fingerprint": "f",
                    "window": 64,
                    "stride": 64,
                    "carry_state": False,
                    "loss_by_position": [{"start": 0, "end": 64, "tokens": 10, "loss": 4.0}],
                }
            )
        )
        (folder / "recall.json").write_text(
            json.dumps(
                {
                    "accuracy": 0.75,
                    "fingerprint": "0",
                    "context": 64,
                    "recall_by_distance": [{"start": 0, "end": 16, "answers": 4, "accuracy": 0.75, "loss": 1.0}],
                }
            )
        )
    return folders


def test_table_json_and_pictures_are_written(call_tool, runs, tmp_path):
    code, said, _ = call_tool("compare", *runs, "--output", tmp_path / "out")
    assert code == 0
    head, first, second, note, warning = said.splitlines()[:5]
    assert head.split()[0] == "kinds" and "last" not in head  # nobody scored the last quarter alone
    assert first.split()[:2] == ["softmax"] * 2 and {"75.0", "250", "400", "2.500"} <= set(first.split())
    assert second.split()[:2] == ["polysketch"] * 2
    assert note.startswith("note: polysketch minus softmax: no run of softmax has both evaluation.json and")
    assert warning == "warning: different numbers of tokens: 300: softmax; 400: polysketch"
    report = json.loads((tmp_path / "out/comparison.json").read_text())
    assert report["schema_version"] == 1 and [row["name"] for row in report["rows"]] == ["softmax", "polysketch"]
    for picture in ("loss_over_tokens", "loss_over_time", "loss_by_position", "recall_by_distance"):
        assert (tmp_path / f"out/{picture}.png").read_bytes().startswith(PNG)


def test_repeated_bigrams_are_columns_and_pictures(call_tool, runs, tmp_path):
    """Where one run has them; an evaluation.json of old does not."""
    code, said, _ = call_tool("compare", *runs, "--output", tmp_path / "old")
    assert code == 0 and "bigrams" not in said.splitlines()[0] and not list((tmp_path / "old").glob("*bigrams*"))
    file, bins = runs[0] / "evaluation.json", [{"start": 0, "end": 16, "tokens": 3, "loss": 1.625}]
    parts = {"tokens": 3, "loss": 1.625, "by_distance": bins, "other_tokens": 7, "other_loss": 4.125}
    for rare, pictures in (
        (None, ["repeated"]),
        ({"tokens": 1, "loss": 0.875, "by_distance": bins}, ["rare", "repeated"]),
    ):
        report = json.loads(file.read_text()) | {"repeated_bigrams": parts | {"rare": rare}}
        file.write_text(json.dumps(report))
        code, said, _ = call_tool("compare", *runs, "--output", tmp_path / "new")
        head, first, second = said.splitlines()[:3]
        assert code == 0 and "repeated bigrams" in head and "other tokens" in head
        assert ("rare bigrams" in head) == ("0.875" in first) == bool(rare)
        assert {"1.625", "4.125"} <= set(first.split()) and second.split().count("-") == len(pictures) + 1
        found = sorted((tmp_path / "new").glob("loss_on_*_bigrams.png"))
        assert [path.name for path in found] == [f"loss_on_{name}_bigrams.png" for name in pictures]
        assert all(path.read_bytes().startswith(PNG) for path in found)


def test_evaluated_runs_are_paired_in_every_file(call_tool, runs, tmp_path):
    for number, folder in enumerate(runs):
        rows = [{"id": f"d{n}", "tokens": 100, "bytes": 400, "nats": 350.0 + n + number} for n in range(10)]
        (folder / "evaluation.documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = json.loads((folder / "evaluation.json").read_text()) | {"loss": 3.545 + number / 100}
        (folder / "evaluation.json").write_text(json.dumps(report))
    code, said, _ = call_tool("compare", *runs, "--output", tmp_path / "out")
    assert code == 0 and max(map(len, said.splitlines()[:8])) <= 120
    [line] = [line for line in said.splitlines() if line.startswith("polysketch  ") and "to" in line]
    assert line.split()[1:6] == ["+0.0036", "+0.0036", "to", "+0.0036", "0.002"]
    assert "minus softmax" in said and "+0.0100" in line
    [paired] = json.loads((tmp_path / "out/comparison.json").read_text())["paired"]
    assert (paired["setting"], paired["minus"], paired["p"]) == ("polysketch", "softmax", 2 / 2**10)
    for name in ("comparison.html", "comparison.md", "paired.csv"):
        assert "0.0036" in (tmp_path / "out" / name).read_text() and name in said.splitlines()[-1]
    assert (
        (tmp_path / "out/comparison.csv").read_text().startswith("name,kinds,seeds,runs,parameters,parameters_spread")
    )


def test_only_a_table_without_output(call_tool, runs):
    code, said, _ = call_tool("compare", runs[0])
    assert code == 0 and "written" not in said
    assert sorted(path.name for path in runs[0].parent.iterdir()) == ["polysketch", "softmax"]


def test_bad_input_is_one_line(call_tool, runs, tmp_path):
    code, _, said = call_tool("compare", runs[0], tmp_path / "absent", "--output", tmp_path / "out")
    assert code == 2 and said.startswith("error: ") and "absent" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
