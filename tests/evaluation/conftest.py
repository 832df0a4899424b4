"""Run folders written by hand."""

import copy
import json

import pytest
import yaml

CONFIG = {
    "run": {"dir": "unused", "seed": 0},
    "model": {
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
        "vocab_size": 10,
        "attention": {"kind": "softmax", "pattern": []},
    },
    "data": {"path": "somewhere", "valid_path": "elsewhere", "context": 64},
    "training": {"global_batch_tokens": 100, "valid_tokens": 64, "precision": "fp32"},
}


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, steps=40, loss=…, finished=True, documents=None, **changes) -> folder; changes are the contents of
    evaluation, recall, retrieval and environment, and section__key=value. Step n of N takes n seconds, with the loss
    `loss` + N - n."""

    def make(name, steps=40, loss=2.0, finished=True, documents=None, **changes):
        reports = {file: changes.pop(file, None) for file in ("evaluation", "recall", "retrieval", "environment")}
        folder, config = tmp_path / name, copy.deepcopy(CONFIG)
        for key, value in changes.items():
            section, key = key.split("__")
            config[section][key] = value
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        rows = [
            {"step": n, "tokens": 100 * n, "loss": loss + steps - n, "step_seconds": float(n)}
            for n in range(1, steps + 1)
        ]
        rows[-2] |= {"valid_loss": 9.0, "valid_bits_per_byte": 9.0}
        rows[-1] |= {"valid_loss": loss + 0.5, "valid_bits_per_byte": 1.25}
        rows.insert(0, {"step": 0, "tokens": 0, "valid_loss": 9.0, "valid_loss/books": 9.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file, content in (*reports.items(), ("summary", {} if finished else None)):
            if content is not None:
                (folder / f"{file}.json").write_text(json.dumps(content))
        if documents is not None:
            (folder / "evaluation.documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
        return folder

    return make
