"""tools/retrieval.py on a checkpoint that was never trained."""

import json

import pytest

from lcpt.model.pretrained import write_export


@pytest.fixture
def retrieve(call_tool, run_folder, train_folder, tmp_path):
    """retrieve(*arguments) -> (exit code, report or None, stdout, stderr)."""

    def call(*arguments):
        output = tmp_path / "new/retrieval.json"
        given = ["--checkpoint", run_folder, "--data", train_folder, "--output", output, *SMALL, *arguments]
        code, table, said = call_tool("retrieval", *given)
        return code, json.loads(output.read_text()) if output.exists() else None, table, said

    return call


SMALL = ["--contexts", "320,256", "--tasks", "niah_single_2,copy", "--depths", "2", "--samples", "3"]
COPY = ["--tasks", "copy", "--contexts", "192"]


def test_reports_every_task_context_and_depth(retrieve, run_folder, tmp_path):
    code, report, table, _ = retrieve()
    assert code == 0 and report["schema_version"] == 1 and report["step"] == 7 and report["documents"] == 3
    assert report["checkpoint"] == str(run_folder / "checkpoints/step-00000007")
    assert report["contexts"] == [256, 320] and report["depths"] == [0, 1] and report["samples"] == 3
    assert report["answer_tokens"]["copy"] == 24 and len(report["fingerprint"]) == 64
    tasks = ["niah_single_2", "copy"]
    cells = [(row["task"], row["context"], row["depth"]) for row in report["rows"]]
    assert cells == [(task, context, depth) for task in tasks for context in (256, 320) for depth in (0, 1)]
    for row in report["rows"]:
        assert row.keys() == {*"task context depth samples chance accuracy accuracy_without nats nats_without".split()}
    for row in report["summary"]:
        rows = [x for x in report["rows"] if (x["task"], x["context"]) == (row["task"], row["context"])]
        assert row["accuracy"] == pytest.approx(sum(x["accuracy"] for x in rows) / 2)
        assert row["gain"] == pytest.approx(sum(x["nats_without"] - x["nats"] for x in rows) / 2)
        assert f"{row['task']:<20}{row['context']:>8,}" in table
    assert (tmp_path / "new/retrieval.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_a_step_and_an_export_are_alike(retrieve, run_folder, tmp_path):
    write_export(run_folder, tmp_path / "export")
    _, one, _, _ = retrieve(*COPY)
    for checkpoint in (run_folder / "checkpoints/step-00000003", tmp_path / "export"):
        code, other, _, _ = retrieve("--checkpoint", checkpoint, *COPY)
        assert code == 0 and other["rows"] == one["rows"] and other["fingerprint"] == one["fingerprint"]
    _, other, _, _ = retrieve(*COPY, "--samples", "2")
    assert other["fingerprint"] != one["fingerprint"]


@pytest.mark.parametrize(
    "arguments, remark",
    [
        (["--checkpoint", "absent"], "absent is no run folder"),
        (["--data", "absent.txt"], "absent.txt"),
        (["--tasks", "copy,niah_singel_2"], "no retrieval task 'niah_singel_2'; did you mean niah_single_2?"),
        (["--tasks", "x"], "there are niah_single_2, niah_multikey_1, copy, associative_recall"),
        (["--contexts", "256,many"], "--contexts 256,many is no list of whole numbers"),
        (["--contexts", "100000"], "no document is long enough: a context of 100000 tokens needs one of 100033"),
        (["--contexts", "32"], "niah_single_2 needs a context of"),
        (["--depths", "0"], "--depths is 0; it must lie in 1 … 16"),
        (["--samples", "0"], "--samples is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--output", "."], "is a folder"),
        (["--output", "out.png"], "out.png is the name of the picture"),
    ],
)
def test_what_cannot_be_done_is_one_line(retrieve, arguments, remark):
    code, report, _, said = retrieve(*arguments)
    assert code == 2 and report is None and remark in said and len(said.splitlines()) == 1


def test_a_picture_that_is_a_folder_is_found_before_anything_is_read(retrieve, tmp_path):
    (tmp_path / "new/retrieval.png").mkdir(parents=True)
    code, report, _, said = retrieve("--checkpoint", "absent")
    assert code == 2 and report is None and "retrieval.png is a folder" in said
