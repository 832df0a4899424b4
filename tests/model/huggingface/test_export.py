"""The folder of an export for transformers: what is in it, what is refused, and that it is read back bit for bit."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lcpt
from lcpt.checkpoint import CheckpointError
from lcpt.data import DataError
from lcpt.model.huggingface import export as module
from lcpt.model.huggingface.export import write_hf_export
from tests.model.conftest import CONFIGS, V, config
from tests.model.huggingface.conftest import load

ROOT = Path(__file__).parents[3]
CODE = ["configuration_lcpt.py", "modeling_lcpt.py", "tokenization_lcpt.py"]
FILES = [
    "README.md",
    "config.json",
    *CODE,
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
]


@pytest.fixture
def export_tool(call_program, make_export, tmp_path):
    """export_tool(*arguments) -> (exit code, stdout, stderr) of tools/export.py --format hf, of an export to "out"."""
    make_export()
    source = tmp_path / "mine-of-lcpt"
    given = ["--checkpoint", source, "--output", tmp_path / "out", "--format", "hf"]
    return lambda *arguments: call_program("tools/export.py", *given, *arguments)


@pytest.mark.parametrize("name", ["nothing by default", "sparse_qk", "llama"])
def test_files_are_as_agreed(make_export, train_folder, name):
    """`lcpt import` relies on it."""
    folder, ours = make_export(CONFIGS[name])
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    content = json.loads((folder / "config.json").read_text())
    assert content["model_type"] == "lcpt" and content["architectures"] == ["LcptForCausalLM"]
    assert content["lcpt"] == {
        "model": asdict(ours.config),
        "context": 64,
        "step": 7,
        "tokens": 700,
        "lcpt_version": lcpt.__version__,
    }
    found, expected = load_file(folder / "model.safetensors"), ours.state_dict()
    assert found.keys() == {f"model.{name}" for name in expected}
    assert all(torch.equal(found[f"model.{name}"], x) and x.dtype != torch.float64 for name, x in expected.items())
    assert (folder / "tokenizer.model").read_bytes() == (train_folder / "tokenizer.model").read_bytes()
    for file in CODE:
        assert (folder / file).read_bytes() == (ROOT / "lcpt/model/huggingface/remote_code" / file).read_bytes()


def test_it_is_the_same_every_time_and_bf16_has_half_the_bytes(make_export, tmp_path):
    folder, ours = make_export(config("sparse_qk", d_model=64))  # whose seeds are whole numbers
    write_hf_export(tmp_path / "mine-of-lcpt", tmp_path / "again/mine")
    assert all((tmp_path / "again/mine" / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    write_hf_export(tmp_path / "mine-of-lcpt", tmp_path / "half", dtype="bf16")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "half")]
    assert 0.5 < sizes[1] / sizes[0] < 0.52
    found = load_file(tmp_path / "half/model.safetensors")
    for name, x in ours.state_dict().items():
        assert torch.equal(found[f"model.{name}"], x.bfloat16() if x.is_floating_point() else x)


def test_transformers_knows_its_size(make_export):
    folder, _ = make_export(config(n_heads=4))
    found = load(folder).config
    assert (found.vocab_size, found.hidden_size, found.num_hidden_layers, found.num_attention_heads) == (V, 16, 2, 4)
    assert (found.max_position_embeddings, found.bos_token_id, found.eos_token_id) == (64, 1, 1)


def test_a_model_that_transformers_saved_is_the_same_again(make_export, tmp_path):
    """The code and the tokenizer go with it: the first folder is gone."""
    from transformers import AutoTokenizer

    folder, ours = make_export(CONFIGS["flurka"])
    load(folder).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    for path in (folder, tmp_path / "mine-of-lcpt"):
        shutil.rmtree(path)
    found = load_file(tmp_path / "saved/model.safetensors")
    assert all(torch.equal(found[f"model.{name}"], x) for name, x in ours.state_dict().items())
    model, tokens = load(tmp_path / "saved"), torch.randint(V, (2, 19))
    assert ".saved." in type(model).__module__ and torch.equal(model(tokens).logits, ours(tokens))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert tokenizer.decode(tokenizer("the river\n").input_ids) == "<s>the river\n"


def test_a_model_begins_anew_as_lcpts_does(make_export):
    """transformers' from_config draws lcpt's initial weights, not its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lcpt.model import GPT

    folder, ours = make_export(CONFIGS["flurka"])
    torch.manual_seed(3)
    found = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    torch.manual_seed(3)
    expected = GPT(ours.config).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in found.model.state_dict().items())


@pytest.mark.parametrize("changed, named", [("out", "has no model.blocks.1.attention.out.weight"), ("new", "has, and")])
def test_a_file_with_other_weights_is_named(make_export, changed, named):
    """transformers alone would say so in a log, and go on with whatever was in memory."""
    folder, _ = make_export()
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop("model.blocks.1.attention.out.weight")
    if changed == "new":
        tensors |= {"model.blocks.1.attention.out.weight": weight, "model.new": weight.clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.safetensors of .*mine {named}"):
        load(folder)


def test_loading_tells_what_was_loaded(make_export):
    model, loaded = load(make_export()[0], output_loading_info=True)
    assert not model.training and not loaded["missing_keys"]


def test_a_few_steps_of_training_lower_the_loss(make_export):
    folder, _ = make_export(CONFIGS["nothing by default"])
    model, tokens = load(folder).train(), torch.randint(V, (2, 19))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_without_lcpt_the_error_says_what_to_install(make_export, tmp_path):
    folder, _ = make_export()
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lcpt", "lcpt_kernels"):
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Absent())
import transformers
for opened in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
    try:
        opened.from_pretrained({str(folder)!r}, trust_remote_code=True)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    first, second = done.stdout.splitlines()
    assert first == second and "not found in your environment: lcpt. Run `pip install lcpt`" in first, done.stderr


def test_the_tool_says_what_it_wrote(export_tool, tmp_path):
    code, out, said = export_tool("--license", "mit")
    assert code == 0 and said == ""
    rows = dict(line.strip().split(maxsplit=1) for line in out.splitlines())
    assert rows["trained"] == "7 steps, 700 tokens, 64 a sequence"
    assert {name for name in rows if "." in name} == set(FILES)
    assert "license: mit" in (tmp_path / "out/README.md").read_text().splitlines()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--checkpoint", "absent"], "absent is no run folder"),
        (["--output", ROOT / "tools"], "tools exists and is no empty folder; choose another --output"),
        (["--license", "as you like"], "license 'as you like' is no identifier; give one such as apache-2.0"),
        (["--format", "lcpt", "--license", "mit"], "--license is for --format hf"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(export_tool, tmp_path, arguments, named):
    before = sorted(tmp_path.iterdir())
    code, out, said = export_tool(*arguments)
    assert code == 2 and out == "" and said.startswith("error: ") and len(said.splitlines()) == 1 and named in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_of_a_task_cannot_go_out(call_program, make_run, tmp_path):
    run, _ = make_run()
    step = run / "checkpoints/step-00000007"
    (step / "tokenizer.model").unlink()
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["files"]["tokenizer.model"]
    from lcpt.utils.hashing import self_sha256

    (step / "manifest.json").write_text(json.dumps(manifest | {"sha256": self_sha256(manifest)}))
    code, out, said = call_program(
        "tools/export.py", "--checkpoint", run, "--output", tmp_path / "out", "--format", "hf"
    )
    assert code == 2 and out == "" and len(said.splitlines()) == 1
    assert f"error: {step} has no tokenizer: it was trained on a task, not on text" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("call", ["save_tensors", "write_tokenizer", "_write_json"])
def test_a_full_disk_leaves_nothing(make_export, tmp_path, monkeypatch, call):
    make_export()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_hf_export(tmp_path / "mine-of-lcpt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-of-lcpt"]


def test_nothing_is_overwritten(make_export, tmp_path):
    folder, _ = make_export()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for error, output in ((CheckpointError, folder), (CheckpointError, folder / "README.md")):
        with pytest.raises(error, match="exists and is no empty folder"):
            write_hf_export(tmp_path / "mine-of-lcpt", output)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="dtype 'fp16' is not known; it is fp32 or bf16"):
        write_hf_export(tmp_path / "mine-of-lcpt", tmp_path / "out", dtype="fp16")


def test_a_tokenizer_that_is_none_is_named(make_run, tmp_path):
    run, _ = make_run()  # whose tokenizer.model holds "a tokenizer"
    with pytest.raises(DataError, match="tokenizer.model: not a SentencePiece model"):
        write_hf_export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_config_of_another_lcpt_is_named(make_export):
    """By lcpt's own check, when transformers opens the folder."""
    folder, ours = make_export()
    content = json.loads((folder / "config.json").read_text())
    content["lcpt"]["model"] = asdict(replace(ours.config)) | {"version": 99}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="config.json describes no model of this lcpt: model.version is 99"):
        load(folder)
