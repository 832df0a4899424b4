import json

from lcpt.evaluation.plots import loss_by_position, loss_curve

PNG = b"\x89PNG\r\n"


def test_both_pictures_are_drawn(tmp_path):
    rows = [{"tokens": 10, "loss": 3.0}, {"tokens": 20, "loss": 2.0, "valid_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    bins = [{"start": 0, "end": 4, "tokens": 4, "loss": 3.0}, {"start": 4, "end": 8, "tokens": 4, "loss": 2.0}]
    loss_by_position({"loss": 2.5, "loss_by_position": bins}, tmp_path / "position.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert (tmp_path / "position.png").read_bytes().startswith(PNG)
