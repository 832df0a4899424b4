"""tools/lm_eval_harness.py on a checkpoint that was never trained, with tasks of files and no network."""

import json
import math
import socket
import sys

import pytest

TEXTS = ["The river saw a green bird. " * 20, "Never quickly.", "The old house é. " * 9]


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    questions = [{"q": "The river saw a", "a": [" bird", " house", " river"], "label": n % 3} for n in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    head = "dataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: %s}}\n"
    (folder / "texts.yaml").write_text(
        head % (folder / "texts.jsonl") + "task: my_texts\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\n"
    )
    (folder / "questions.yaml").write_text(
        head % (folder / "questions.jsonl") + "task: my_questions\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{a}}"\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "answers.yaml").write_text(
        head % (folder / "questions.jsonl") + "task: my_answers\noutput_type: generate_until\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a[0]}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 5}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


@pytest.fixture
def harness(call_tool, run_folder, tmp_path, monkeypatch):
    """harness(*arguments) -> (exit code, report or None, stdout, stderr), with a network that nobody may use."""

    def refuse(*_, **__):
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def call(*arguments):
        output = tmp_path / "out.json"
        code, out, said = call_tool("lm_eval_harness", "--checkpoint", run_folder, "--output", output, *arguments)
        return code, json.loads(output.read_text()) if output.exists() else None, out, said

    return call


def test_tasks_of_files(harness, tasks, run_folder):
    pytest.importorskip("lm_eval", reason="pip install lcpt[eval]")
    code, report, out, said = harness(
        "--tasks", "my_texts,my_questions,my_answers", "--include-path", tasks, "--batch", 4
    )
    assert code == 0, said
    assert report["results"]["my_texts"]["bits_per_byte,none"] == pytest.approx(
        math.log2(report["results"]["my_texts"]["byte_perplexity,none"])
    )
    assert 0 <= report["results"]["my_questions"]["acc,none"] <= 1
    assert "exact_match,none" in report["results"]["my_answers"]
    assert report["step"] == 7 and report["window"] == 64 and report["last_window"] == "full"
    assert report["samples"]["my_texts"]["effective"] == 3
    assert "bits_per_byte" in out and "acc" in out


def test_bits_per_byte_is_that_of_evaluate_where_no_window_is_the_last_of_several(harness, tasks, call_tool, tmp_path):
    """A context that holds every text: both cut one window each, and the rule of the last does not count."""
    pytest.importorskip("lm_eval", reason="pip install lcpt[eval]")
    code, report, _, said = harness("--tasks", "my_texts", "--include-path", tasks, "--context", 2048)
    assert code == 0, said
    output = tmp_path / "evaluation.json"
    run = report["checkpoint"]
    data = tasks / "texts.jsonl"
    code, _, said = call_tool("evaluate", "--checkpoint", run, "--data", data, "--context", 2048, "--output", output)
    assert code == 0, said
    ours = json.loads(output.read_text())["bits_per_byte"]
    assert report["results"]["my_texts"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-6)


def one_line(said):
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_an_unknown_task_is_one_line(harness, tasks, monkeypatch):
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="pip install lcpt[eval]")
    manager = lm_eval_tasks.TaskManager
    # Its own tasks take half a minute to read.
    monkeypatch.setattr(
        lm_eval_tasks,
        "TaskManager",
        lambda include_path, include_defaults: manager(None, include_path, include_defaults=False),
    )
    code, report, _, said = harness("--tasks", "my_texts,my_tasks", "--include-path", tasks)
    assert code == 2 and report is None
    assert "'my_tasks'" in one_line(said) and "'my_texts'" not in said


def test_without_lm_eval_it_says_what_to_install(harness, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lcpt.evaluation.lm_eval_model", raising=False)

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "lm_eval":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    code, _, _, said = harness("--tasks", "wikitext")
    assert code == 2
    assert "pip install 'lcpt[eval]'" in one_line(said)


def test_a_checkpoint_without_a_tokenizer_is_one_line(harness, tasks, run_folder):
    pytest.importorskip("lm_eval", reason="pip install lcpt[eval]")
    step = run_folder / "checkpoints/step-00000007"
    (step / "tokenizer.model").unlink()
    code, _, _, said = harness("--tasks", "my_texts", "--include-path", tasks, "--checkpoint", step)
    assert code == 2
    assert "tokenizer" in one_line(said)


def test_bad_arguments_are_one_line(harness, tasks, tmp_path):
    for arguments, named in (
        (("--batch", 0), "--batch is 0"),
        (("--include-path", tmp_path / "none"), "--include-path"),
        (("--output", tmp_path), "is a folder"),
    ):
        code, _, _, said = harness("--tasks", "my_texts", *arguments)
        assert code == 2
        assert named in one_line(said)
