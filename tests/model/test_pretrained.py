"""Check that an export is read back bit for bit, and that an output folder appears whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lcpt.checkpoint import CheckpointError
from lcpt.model import GPT, load_pretrained, load_weights
from lcpt.model import pretrained as module
from lcpt.model.pretrained import open_pretrained, write_export
from lcpt.utils import tensor_files
from lcpt.utils.hashing import file_sha256
from tests.model.conftest import CONFIGS, FILES, V


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_bit_for_bit_the_model_of_its_step(make_run, tmp_path, name):
    run, trained = make_run(CONFIGS[name])
    write_export(run, tmp_path / "export")
    loaded = load_pretrained(tmp_path / "export")
    of_step = GPT(CONFIGS[name])
    load_weights(of_step, run)
    assert loaded.config == CONFIGS[name] and not loaded.training
    expected, found = trained.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in trained.named_parameters()]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    tokens = torch.randint(V, (3, 19))
    logits = loaded(tokens)
    assert torch.equal(logits, of_step(tokens)) and torch.equal(logits, trained(tokens))


def test_an_export_in_bf16_is_half_as_large_and_opens_as_its_rounded_weights(make_run, tmp_path):
    run, trained = make_run(CONFIGS["nothing by default"])
    write_export(run, tmp_path / "export")
    write_export(run, tmp_path / "half", dtype="bf16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("export", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    for name, tensor in load_pretrained(tmp_path / "half").state_dict().items():
        exact = trained.state_dict()[name]
        rounded = exact.bfloat16().to(exact.dtype) if exact.is_floating_point() else exact
        assert tensor.dtype == exact.dtype and torch.equal(tensor, rounded), name
    with pytest.raises(ValueError, match="fp16"):
        write_export(run, tmp_path / "other", dtype="fp16")
    assert not (tmp_path / "other").exists()


def test_a_run_a_step_and_an_export_open_the_same(run, export):
    step = run / "checkpoints/step-00000007"
    tokens = torch.randint(V, (1, 19))
    logits = load_pretrained(export)(tokens)
    for source, folder in ((run, step), (step, step), (str(export), export)):
        opened = open_pretrained(source)
        assert opened.folder == folder and opened.tokenizer == folder / "tokenizer.model"
        assert (opened.context, opened.step, opened.tokens) == (64, 7, 700)
        assert torch.equal(opened.model(tokens), logits) and not opened.model.training


def test_files_are_as_documented(make_run, tmp_path):
    run, model = make_run(CONFIGS["nothing by default"])
    returned = write_export(run, tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == sorted(FILES)
    content = json.loads((tmp_path / "export/config.json").read_text())
    assert content == returned and content["schema_version"] == 1 and content["lcpt_version"]
    assert (content["step"], content["tokens"], content["context"]) == (7, 700, 64)
    assert content["parameters"] == sum(p.numel() for p in model.parameters())
    assert content["model"] == asdict(CONFIGS["nothing by default"])
    for name in ("model.safetensors", "tokenizer.model"):
        file = tmp_path / "export" / name
        assert content["files"][name] == {"size_bytes": file.stat().st_size, "sha256": file_sha256(file)}
    assert (tmp_path / "export/tokenizer.model").read_text() == "a tokenizer"


def test_others_read_the_weights_without_lcpt(make_run, tmp_path):
    """By name, in the model's shapes, buffers with them."""
    run, model = make_run(CONFIGS["gaussian"])
    write_export(run, tmp_path / "export")
    found = load_file(tmp_path / "export/model.safetensors")
    assert "blocks.0.attention.sketch.G" in found and found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor)


def test_whoever_may_read_one_file_may_read_all(run, tmp_path):
    before = os.umask(0o027)
    try:
        write_export(run, tmp_path / "export")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "export").iterdir()} == {0o640}


def test_an_export_of_a_step_has_the_same_bytes_each_time(run, export, tmp_path):
    for source in (run, export):
        write_export(source, tmp_path / "again")
        for name in FILES:
            assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes()
        shutil.rmtree(tmp_path / "again")


def test_loading_draws_no_random_numbers(export):
    before = torch.get_rng_state()
    load_pretrained(export)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_does_not_lean_on_the_file(export):
    model = load_pretrained(export)
    before = model(torch.arange(9)[None])
    with open(export / "model.safetensors", "r+b") as file:
        file.write(bytes((export / "model.safetensors").stat().st_size))
    assert torch.equal(model(torch.arange(9)[None]), before)


def test_needs_neither_deepspeed_nor_triton(export):
    """Not where they are installed, and not where they are missing."""
    program = f"""
import sys
if missing := "missing" in sys.argv:
    sys.modules |= dict.fromkeys(("deepspeed", "triton"))
from lcpt.model import GPT, load_pretrained
import torch
model = load_pretrained({str(export)!r})
assert isinstance(model, GPT) and model(torch.arange(19)[None]).isfinite().all()
assert missing or not {{name.partition(".")[0] for name in sys.modules}} & {{"deepspeed", "triton"}}
"""
    for mode in ("installed", "missing"):
        done = subprocess.run([sys.executable, "-c", program, mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("occupied", ["export", "run/checkpoints/step-00000007", "run", "notes.txt"])
def test_nothing_is_overwritten(run, export, tmp_path, occupied):
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="exists and is no empty folder; choose another --output"):
        write_export(run, tmp_path / occupied)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_and_new_parents_will_do(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new/parents/export"):
        write_export(run, output)
        load_pretrained(output)


def test_an_occupied_output_is_said_before_the_checkpoint_is_read(run, export, monkeypatch):
    monkeypatch.setattr(module, "open_pretrained", lambda source: pytest.fail("read it"))
    with pytest.raises(CheckpointError, match="choose another"):
        write_export(run, export)


def test_a_damaged_checkpoint_leaves_nothing(run, tmp_path):
    weights = run / "checkpoints/step-00000007/weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="weights-00000"):
        write_export(run, tmp_path / "new/export")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("call", ["save_file", "copyfile", "size_and_sha256", "new_folder"])
def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        if call == "save_file":
            raise SafetensorError("No space left on device")
        raise OSError(28, "No space left on device")

    owner = {"save_file": tensor_files, "copyfile": shutil}.get(call, module)
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_export(run, tmp_path / "export")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_killed_at_any_moment_is_whole_or_absent(run, tmp_path, run_ranks, monkeypatch):
    """kill -9 at the first, second, … opening of a file to write, renaming or syncing: there is a whole export under
    the final name or none, and the next one works and leaves nothing else."""
    survived = killed = 0
    while not survived:
        moments = 0

        def dies(event, arguments, moment=killed):
            nonlocal moments
            writes = event == "open" and str(tmp_path) in str(arguments[0]) and arguments[2] & os.O_WRONLY
            if writes or event in ("os.rename", "os.fsync", "os.chmod"):
                moments += 1
                if moments > moment:
                    os.kill(os.getpid(), 9)

        def exporting(dies=dies):
            sync = os.fsync
            os.fsync = lambda descriptor: (sys.audit("os.fsync"), sync(descriptor))
            sys.addaudithook(dies)
            write_export(run, tmp_path / "export")

        try:
            run_ranks(exporting, 1)
            survived += 1
        except RuntimeError as error:
            if "signal 9" not in str(error):
                raise
            killed += 1
        if (tmp_path / "export").exists():
            load_pretrained(tmp_path / "export")
            shutil.rmtree(tmp_path / "export")
        write_export(run, tmp_path / "export")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]
        shutil.rmtree(tmp_path / "export")
    assert killed >= 8  # two files opened by Python, one mode, three files and two folders synced, one renaming
