"""tools/compare.py on two runs that never were: the table, the JSON and the pictures."""

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
                    "training": {"global_batch_tokens": 100, "valid_tokens": 64},
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
    head, first, second, warning = said.splitlines()[:4]
    assert head.split()[0] == "kinds" and "last" not in head  # nobody scored the last quarter alone
    assert first.split()[:2] == ["softmax"] * 2 and {"75.0", "250", "400", "2.500"} <= set(first.split())
    assert second.split()[:2] == ["polysketch"] * 2
    assert warning == "warning: different numbers of tokens: 300: softmax; 400: polysketch"
    report = json.loads((tmp_path / "out/comparison.json").read_text())
    assert report["schema_version"] == 1 and [row["name"] for row in report["rows"]] == ["softmax", "polysketch"]
    for picture in ("loss_over_tokens", "loss_over_time", "loss_by_position", "recall_by_distance"):
        assert (tmp_path / f"out/{picture}.png").read_bytes().startswith(PNG)


def test_only_a_table_without_output(call_tool, runs):
    code, said, _ = call_tool("compare", runs[0])
    assert code == 0 and "written" not in said
    assert sorted(path.name for path in runs[0].parent.iterdir()) == ["polysketch", "softmax"]


def test_bad_input_is_one_line(call_tool, runs, tmp_path):
    code, _, said = call_tool("compare", runs[0], tmp_path / "absent", "--output", tmp_path / "out")
    assert code == 2 and said.startswith("error: ") and "absent" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
