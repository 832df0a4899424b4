"""tools/demo.py with commands that only pretend: what is done is not done again, what is missing is made."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOOKS = {
    "tokens": 1000,
    "tokens_per_second": 10.0,
    "bits_per_byte": 2.0,
    "xz_bits_per_byte": 2.5,
    "unigram_bits_per_byte": 3.0,
    "step_milliseconds": {"polysketch": 1000.0, "softmax": 2000.0},
}
BINS = [{"start": 0, "end": 1792, "accuracy": 1.0}, {"start": 1792, "end": 2048, "accuracy": 0.5}]


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The program in a folder of its own, with `commands` that it gave and `fails`, a word of the one that fails."""
    module = importlib.reload(importlib.import_module("lcpt.commands.demo"))
    monkeypatch.setattr(sys, "argv", ["demo"])
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    module.commands, module.fails = [], None

    def call(program, *arguments, env=None, log=None):
        words = [str(word) for word in arguments]
        module.commands.append(" ".join([program, *words]))
        if module.fails and module.fails in module.commands[-1]:
            raise SystemExit("error")
        if program == "deepspeed":
            run = next((word[8:] for word in words if word.startswith("run.dir=")), "runs/demo")
            make(Path(run) / "summary.json", {})
            (Path(run) / "metrics.jsonl").write_text('{"tokens": 10, "loss": 3.0}\n')
        else:
            position = {"start": 0, "end": 8192, "tokens": 9, "loss": 3.0}
            report = {"loss": 3.0, "loss_by_position": [position], "recall_by_distance": BINS}
            make(Path(words[words.index("--output") + 1]), report)

    monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(module, "collect", lambda config, run: BOOKS)
    return module


def make(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_second_call_prints_what_the_first_one_made(demo, capsys):
    assert demo.main() == 0
    assert len(demo.commands) == 1 + 2 + 2 * 3  # books: train, evaluate, time; recall: two runs and one evaluation each
    assert "recall at 2,048 polysketch 50.0 %, window of 128 tokens 50.0 %, chance 3.1 %" in capsys.readouterr().out
    figures = json.loads(Path("runs/demo/demo.json").read_text())
    assert figures["recall"]["by_distance"] == {"polysketch": BINS, "window": BINS}
    for name in ("loss", "loss_by_position", "recall_by_distance"):
        assert Path(f"runs/demo/{name}.png").exists()
    demo.commands.clear()
    assert demo.main() == 0 and demo.commands == []
    assert "holds a finished demo" in capsys.readouterr().out


def test_the_window_model_differs_in_attention_alone(demo):
    demo.main()
    commands = [c.split("pretrain.py ")[1] for c in demo.commands if "configs/demo-recall.yaml" in c]
    polysketch, window = (
        sorted(c.replace(f"recall/{name}/", "") for c in commands if f"recall/{name}/" in c)
        for name in ("polysketch", "window")
    )
    change = " model.attention.kind=softmax model.attention.softmax.window=128"
    assert change in window[0] and [c.replace(change, "") for c in window] == polysketch


def test_an_interrupted_demo_goes_on_with_what_is_missing(demo):
    demo.fails = "run.dir=runs/demo/recall/window/long"
    with pytest.raises(SystemExit):
        demo.main()
    demo.commands.clear()
    demo.fails = None
    assert demo.main() == 0
    assert [c.split()[0] for c in demo.commands] == ["deepspeed", "python"]
    assert all("recall/window/long" in c for c in demo.commands)


def test_a_result_of_an_earlier_version_gets_what_it_lacks(demo):
    for name in ("summary", "steps"):
        make(Path(f"runs/demo/{name}.json"), {})
    Path("runs/demo/metrics.jsonl").write_text('{"tokens": 10, "loss": 3.0}\n')
    make(Path("runs/demo/evaluation.json"), {"loss": 3.0, "loss_by_position": [{"start": 0, "end": 9, "loss": 3.0}]})
    make(Path("runs/demo/demo.json"), BOOKS | {"seconds": 1.0})
    assert demo.main() == 0
    assert len(demo.commands) == 6 and all("recall" in c for c in demo.commands)
    assert "recall" in json.loads(Path("runs/demo/demo.json").read_text())


def test_a_run_that_left_before_its_end_is_not_taken_for_a_finished_one(demo, monkeypatch):
    monkeypatch.setattr(demo, "pretrain", lambda *arguments, log: None)
    with pytest.raises(SystemExit, match="interrupted"):
        demo.learn_and_ask(Path("runs/demo/recall/polysketch"), [])
