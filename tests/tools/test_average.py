"""tools/average.py on checkpoints of two runs that were never trained."""

import json
from dataclasses import replace

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.checkpoint import Slice, commit_checkpoint, open_partial, read_manifest, write_piece
from lcpt.config import Config, to_yaml
from lcpt.data import DataConfig
from lcpt.model import GPT, ModelConfig, load_pretrained
from lcpt.training.run_folder import RunConfig

SKETCH = AttentionConfig(kind="polysketch", block_size=16, polysketch=PolysketchConfig(size=8, sketch="gaussian"))
MODEL = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=330, attention=SKETCH)


@pytest.fixture
def save(train_folder, tmp_path):
    """save(run, step, model, context=64, tokenizer=…) -> the step folder."""

    def save(run, step, model, context=64, tokenizer=train_folder / "tokenizer.model"):
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        config = Config(run=RunConfig("unused"), model=model.config, data=DataConfig(path="unused", context=context))
        (folder / "config.yaml").write_text(to_yaml(config))
        files = {"config.yaml": folder / "config.yaml", **({"tokenizer.model": tokenizer} if tokenizer else {})}
        tensors = [Slice(name, tuple(x.shape), 0, x.flatten().float()) for name, x in model.state_dict().items()]
        partial, state = open_partial(folder / "checkpoints", step), {"step": step, "tokens": 128 * step}
        commit_checkpoint(partial, step, [write_piece(partial, 0, {"weights": tensors})], state, files)
        return folder / f"checkpoints/step-{step:08d}"

    return save


@pytest.fixture
def models():
    """Three models with other weights and the same random features."""
    models = [GPT(MODEL) for _ in range(3)]
    buffers = dict(models[0].named_buffers())
    for model in models[1:]:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return models


@pytest.fixture
def steps(save, models):
    """Steps 3 and 7 of the run `trunk`, and step 9 of the run `branch`."""
    places = (("trunk", 3), ("trunk", 7), ("branch", 9))
    return [save(*place, model) for place, model in zip(places, models, strict=True)]


@pytest.fixture
def average(call_tool, tmp_path):
    """average(*arguments) -> (exit code, stdout, stderr), to tmp_path / "mean"."""
    return lambda *arguments: call_tool("average", *arguments, "--output", tmp_path / "mean")


def test_the_mean_is_that_of_float64(average, steps, models, tmp_path):
    code, out, said = average(*steps)
    assert (code, said) == (0, "")
    mean = load_pretrained(tmp_path / "mean")
    states = [model.state_dict() for model in models]
    for name, tensor in mean.state_dict().items():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert not torch.equal(mean.embedding.weight, models[0].embedding.weight) and mean.config == MODEL
    assert any(name.endswith(".G") for name, _ in mean.named_buffers())
    lines = [line.split("  ")[-1].strip() for line in out.splitlines() if line.startswith("mean of")]
    assert lines == ["trunk, step 3", "trunk, step 7", "branch, step 9"]


def test_the_export_says_what_it_is_the_mean_of(average, steps, tmp_path):
    """A run is its newest step."""
    assert average(steps[0].parents[1], steps[2].parents[1])[0] == 0
    content = json.loads((tmp_path / "mean/config.json").read_text())
    assert content["mean_of"] == [
        {"run": "trunk", "step": 7, "sha256": read_manifest(steps[1])["sha256"]},
        {"run": "branch", "step": 9, "sha256": read_manifest(steps[2])["sha256"]},
    ]
    assert (content["step"], content["tokens"], content["context"]) == (9, 9 * 128, 64)
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    }


def test_it_is_evaluated_and_continues_a_text(average, call_tool, steps, valid_folder, tmp_path):
    assert average(*steps)[0] == 0
    output = tmp_path / "evaluation.json"
    arguments = ["--checkpoint", tmp_path / "mean", "--data", valid_folder, "--output", output]
    assert call_tool("evaluate", *arguments)[0] == 0
    assert json.loads(output.read_text())["step"] == 9
    assert call_tool("generate", "--checkpoint", tmp_path / "mean", "--prompt", "A bird", "--max-tokens", "3")[0] == 0


def test_what_a_model_does_not_compute_may_differ(average, save, steps, models):
    changed = GPT(replace(MODEL, z_loss=0.1, activation_checkpointing=True))
    changed.load_state_dict(models[2].state_dict())
    assert average(steps[0], save("other", 4, changed, context=128))[0] == 0


@pytest.fixture(scope="module")
def other_tokenizer(make_corpus):
    return make_corpus(seed=5) / "tokenizer.model"


def test_what_has_no_mean_is_one_line(average, save, other_tokenizer, steps, models, tmp_path):
    wider = save("wider", 1, GPT(replace(MODEL, d_ff=64)))
    sketch = replace(SKETCH, polysketch=PolysketchConfig(size=16, sketch="gaussian"))
    other_sketch = save("sketch", 1, GPT(replace(MODEL, attention=sketch)))
    drawn_anew = save("drawn", 1, GPT(MODEL))
    foreign = save("foreign", 1, models[1], tokenizer=other_tokenizer)
    on_task = [save(f"task{n}", n, model, tokenizer=None) for n, model in enumerate(models[:2], start=1)]
    damaged = save("damaged", 1, models[1])
    content = bytearray((damaged / "weights-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "weights-00000.safetensors").write_bytes(content)
    for given, parts in (
        ([steps[0]], ["two checkpoints or more"]),
        ([steps[0], steps[0]], ["are the same checkpoint"]),
        ([steps[1], steps[1].parents[1]], ["are the same checkpoint", "step-00000007"]),
        ([steps[0], wider], [str(wider), "different models: model.d_ff is None and 64"]),
        ([steps[0], other_sketch], ["model.attention.polysketch.size is 8 and 16"]),
        ([steps[0], drawn_anew], [str(drawn_anew), ".G, which was drawn at random"]),
        ([steps[0], foreign], [str(foreign), "different tokenizers"]),
        (on_task, ["no tokenizer"]),
        ([steps[0], damaged], [str(damaged / "weights-00000.safetensors")]),
        ([steps[0], tmp_path / "nowhere"], ["nowhere is no run folder"]),
    ):
        code, out, said = average(*given)
        assert (code, out) == (2, "") and said.startswith("error: ") and len(said.splitlines()) == 1, said
        assert all(part in said for part in parts), said
        assert not list(tmp_path.glob("*mean*")) and not list(tmp_path.glob(".*"))


def test_an_output_that_exists_is_refused_and_left(average, steps, tmp_path):
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean/mine").write_text("kept")
    code, _, said = average(*steps)
    assert code == 2 and "mean exists and is no empty folder" in said
    assert [path.name for path in (tmp_path / "mean").iterdir()] == ["mine"]


def test_ctrl_c_leaves_nothing_behind(average, steps, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcpt.utils.tensor_files.save_file", interrupted)
    code, out, said = average(*steps)
    assert (code, out, said) == (130, "", "error: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branch", "trunk"]
