"""tools/export.py on a checkpoint that was never trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcpt.model import load_pretrained

TOOL = Path(__file__).parents[2] / "tools/export.py"


@pytest.fixture
def export(call_tool, run_folder, tmp_path):
    """export(*arguments) -> (exit code, stdout, stderr), of run_folder to tmp_path / "export" unless they say else."""
    return lambda *arguments: call_tool(
        "export", "--checkpoint", run_folder, "--output", tmp_path / "export", *arguments
    )


def test_the_tool_needs_neither_deepspeed_nor_triton(run_folder, model, train_folder, tmp_path):
    """In a folder of its own, without deepspeed and triton."""
    without = "import runpy, sys; sys.modules |= dict.fromkeys(('deepspeed', 'triton')); "
    program = without + f"sys.argv[0] = {str(TOOL)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, "--checkpoint", "run", "--output", "exports/mine"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    folder = tmp_path / "exports/mine"
    loaded, tokens = load_pretrained(folder), torch.arange(40)[None]
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    assert (folder / "tokenizer.model").read_bytes() == (train_folder / "tokenizer.model").read_bytes()
    parameters = sum(p.numel() for p in model.parameters())
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert rows[:2] == [["parameters", f"{parameters:,}"], ["trained", "7 steps, 896 tokens, 64 a sequence"]]
    assert done.stdout.splitlines()[2].endswith(" exports/mine")
    assert dict(rows[3:]) == {file.name: f"{file.stat().st_size:,} bytes" for file in folder.iterdir()}


def test_a_run_is_its_newest_step_and_a_step_is_itself(export, run_folder, tmp_path):
    steps = []
    for n, source in enumerate((run_folder, run_folder / "checkpoints/step-00000003")):
        code, _, _ = export("--checkpoint", source, "--output", tmp_path / str(n))
        content = json.loads((tmp_path / str(n) / "config.json").read_text())
        steps.append((code, content["step"], content["tokens"]))
    assert steps == [(0, 7, 896), (0, 3, 384)]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--checkpoint", "absent"], "absent is no run folder"),
        (["--checkpoint", TOOL.parent], "tools is no run folder"),
        (["--output", TOOL.parent], "tools exists and is no empty folder; choose another --output"),
        (["--output", TOOL], "export.py exists and is no empty folder; choose another --output"),
        (["--output", TOOL / "below"], "export.py"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(export, tmp_path, arguments, named):
    code, out, said = export(*arguments)
    assert code == 2 and out == "" and said.startswith("error: ") and len(said.splitlines()) == 1 and named in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("file", ["weights-00000.safetensors", "config.yaml", "tokenizer.model", "state.json"])
def test_a_damaged_checkpoint_is_named(export, run_folder, tmp_path, file):
    """A step that was asked for is refused; of a run the step before it is taken."""
    step = run_folder / "checkpoints/step-00000007"
    content = (step / file).read_bytes()
    (step / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, said = export("--checkpoint", step)
    assert code == 2 and out == "" and said.startswith(f"error: {step / file} ") and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    code, out, said = export()
    assert code == 0 and "3 steps" in out
    [line] = said.splitlines()
    assert line.startswith(f"warning: {step / file} ") and line.endswith("; taking step-00000003")


def test_a_run_whose_newest_step_is_gone_is_exported_from_the_one_before(export, run_folder):
    shutil.rmtree(run_folder / "checkpoints/step-00000007")
    code, out, said = export()
    assert code == 0 and "3 steps" in out
    [line] = said.splitlines()
    assert line.startswith("warning: ") and "step-00000007" in line and line.endswith("; taking step-00000003")


def test_a_run_without_a_whole_step_is_refused(export, run_folder):
    for step in run_folder.glob("checkpoints/step-*"):
        (step / "state.json").unlink()
    code, out, said = export()
    assert code == 2 and out == "" and len(said.splitlines()) == 1
    assert "step-00000003/state.json" in said and "step-00000007/state.json" in said


def test_a_second_export_leaves_the_first(export, tmp_path):
    assert export()[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    code, _, said = export()
    assert code == 2 and "choose another --output" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before


def test_an_output_that_another_process_writes_is_refused(export, tmp_path):
    from lcpt.data.atomic_folder import new_folder

    with new_folder(tmp_path / "export"):
        code, _, said = export()
    assert code == 2 and "another process writes there" in said and len(said.splitlines()) == 1


def test_ctrl_c_leaves_nothing_behind(export, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcpt.utils.tensor_files.save_file", interrupted)
    code, out, said = export()
    assert code == 130 and out == "" and said == "error: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_help_has_an_example():
    done = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "lcpt export --checkpoint" in done.stdout
