import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.checkpoint import CheckpointError, Slice, open_partial, seal, write_piece
from lcpt.checkpoint.files import self_hash, sha256_of
from lcpt.config import Config, to_yaml
from lcpt.data import DataConfig
from lcpt.model import GPT, ModelConfig, load_pretrained, load_weights
from lcpt.model import pretrained as module
from lcpt.model.pretrained import open_pretrained, write_export
from lcpt.training.run_folder import RunConfig

FILES = ("model.safetensors", "config.json", "tokenizer.model")
V = 50


def config(kind="polysketch", sketch="learned", **changes):
    attention = AttentionConfig(kind=kind, block_size=4, polysketch=PolysketchConfig(sketch=sketch, size=8))
    shape = {"n_layers": 2, "d_model": 16, "n_heads": 2, "vocab_size": V, "attention": attention}
    return ModelConfig(**shape | changes)


CONFIGS = {kind: config(kind) for kind in ATTENTION} | {
    "gaussian": config(sketch="gaussian"),
    "nothing by default": config(
        n_layers=5, n_heads=4, n_kv_heads=2, d_ff=24, rope_base=500.0, activation_checkpointing=True,
        attention=AttentionConfig(
            kind="softmax", pattern=["polysketch", "polynomial", "softmax"], block_size=8,
            polynomial=PolynomialConfig(degree=2),
            polysketch=PolysketchConfig(sketch="gaussian", size=6, expansion=3, local_blocks=2),
        ),
    ),
}


@pytest.fixture
def make_run(tmp_path):
    """make_run(config, name="run") -> (run folder of a model after 7 steps, that model)."""

    def make(model_config=None, name="run"):
        model = GPT(model_config or config())
        with torch.no_grad():
            for tensor in model.state_dict().values():
                # No weight is what GPT() begins with, nor a seed.
                tensor.add_(1 if tensor.dtype == torch.int64 else 0.1 * torch.randn_like(tensor))
        run = tmp_path / name
        run.mkdir()
        whole = Config(run=RunConfig("unused"), model=model.config, data=DataConfig(path="unused", context=64))
        (run / "config.yaml").write_text(to_yaml(whole))
        (run / "tokenizer.model").write_text("a tokenizer")
        attachments = {file: run / file for file in ("config.yaml", "tokenizer.model")}
        weights = [Slice(n, tuple(x.shape), 0, x.flatten()) for n, x in model.state_dict().items()]
        partial = open_partial(run / "checkpoints", 7)
        seal(partial, 7, [write_piece(partial, 0, {"weights": weights})], {"step": 7, "tokens": 700}, attachments)
        return run, model

    return make


@pytest.fixture
def run(make_run):
    return make_run()[0]


@pytest.fixture
def export(run, tmp_path):
    """An export folder of its own."""
    write_export(run, tmp_path / "export")
    return tmp_path / "export"


def rewrite(export, **changes):
    """Change config.json as its own writer would: with its hashes in order."""
    path = export / "config.json"
    content = json.loads(path.read_text()) | changes
    for name in content["files"]:
        file = export / name
        content["files"][name] = {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)}
    path.write_text(json.dumps(content | {"sha256": self_hash(content)}))


def refusal(export, opened=load_pretrained) -> str:
    """The one line with which an export is refused."""
    with pytest.raises(CheckpointError) as caught:
        opened(export)
    line = str(caught.value)
    assert "\n" not in line and ";" in line  # what is wrong; what to do
    return line


@pytest.mark.parametrize("name", CONFIGS)
def test_bit_for_bit_the_model_of_the_step(make_run, tmp_path, name):
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
        assert content["files"][name] == {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)}
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


# --- damage ---


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped bit", "longer"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named(export, file, how):
    path = export / file
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({
            "empty": b"", "truncated": content[:-1], "longer": content + b"x",
            "flipped bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }[how])
    if (file, how) == ("config.json", "truncated"):
        path.write_bytes(content[: 2 * middle - 2])  # without the closing brace: a newline alone is no damage
    for opened in (load_pretrained, open_pretrained):
        assert str(path) in refusal(export, opened)


def test_any_flipped_bit_is_noticed_or_changes_nothing(export):
    noticed = 0
    for name in FILES:
        path = export / name
        content = path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 40)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            try:
                load_pretrained(export)
            except CheckpointError as error:
                noticed += str(path) in str(error)
            else:  # white space between the keys of config.json
                assert name == "config.json" and json.loads(path.read_text()) == json.loads(content)
        path.write_bytes(content)
    assert noticed > 60


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_a_file_of_another_export_is_named(make_run, export, tmp_path, name):
    run, _ = make_run(name="other")
    write_export(run, tmp_path / "other export")
    (tmp_path / "other export/tokenizer.model").write_text("another one")
    shutil.copyfile(tmp_path / "other export" / name, export / name)
    assert str(export / name) in refusal(export)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", "not JSON", "\udcff", "[" * 100_000,
                                     '{"architectures": ["GPT2LMHeadModel"], "n_layer": 12}'])
def test_json_that_is_no_config_of_ours(export, content):
    (export / "config.json").write_text(content, errors="surrogateescape")
    assert str(export / "config.json") in refusal(export)


@pytest.mark.parametrize("changes, named", [
    ({"schema_version": 2}, "schema 2, this lcpt reads 1"),
    ({"schema_version": "1"}, "schema 1"),
    ({"quantisation": "int8"}, "quantisation"),
    ({"model": asdict(config()) | {"n_experts": 8}}, "n_experts"),
    ({"model": asdict(config()) | {"attention": {"kind": "flash"}}}, "'flash'"),
    ({"model": {"attention": {"polysketch": {"branches": 3}}}}, "model.attention.polysketch.branches"),
    ({"model": asdict(config()) | {"n_layers": 0}}, "model.n_layers is 0"),
    ({"model": asdict(config()) | {"n_layers": "two"}}, "model.n_layers"),
    ({"model": None}, "model"),
], ids=str)
def test_a_config_that_this_lcpt_does_not_know(export, changes, named):
    """Hashes in order: as a newer lcpt would write it."""
    rewrite(export, **changes)
    line = refusal(export)
    assert str(export / "config.json") in line and named in line and "lcpt" in line


def test_a_config_that_lacks_a_key(export):
    path = export / "config.json"
    content = json.loads(path.read_text())
    del content["context"]
    path.write_text(json.dumps(content | {"sha256": self_hash(content)}))
    line = refusal(export)
    assert str(path) in line and "context" in line


def test_a_newer_schema_is_named_even_if_it_is_hashed_otherwise(export):
    path = export / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    assert "schema 2" in refusal(export)


def test_an_edited_config_is_refused(export):
    path = export / "config.json"
    path.write_text(path.read_text().replace('"rope_base": 10000.0', '"rope_base": 20000.0'))
    assert "20000" in path.read_text() and "damaged or edited" in refusal(export)


def test_a_key_that_is_newer_than_the_export_has_its_default(export):
    """As long as defaults mean what was before."""
    rewrite(export, model={key: value for key, value in asdict(config()).items() if key != "rope_base"})
    assert load_pretrained(export).config == config()


@pytest.mark.parametrize("changes, named", [
    ({"n_layers": 3}, "blocks.2.attention.gamma is absent there and [2] in the config"),
    ({"n_layers": 1}, "blocks.1.attention.gamma is [2] there and absent in the config"),
    ({"d_ff": 24}, "blocks.0.feed_forward.down.weight is [16, 40] there and [16, 24] in the config"),
], ids=str)
def test_weights_of_another_model_are_named(export, changes, named):
    rewrite(export, model=asdict(config(**changes)))
    line = refusal(export)
    assert str(export / "model.safetensors") in line and named in line


def test_a_missing_buffer_is_named(make_run, tmp_path):
    run, _ = make_run(CONFIGS["gaussian"])
    write_export(run, tmp_path / "export")
    file = tmp_path / "export/model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if not n.endswith("0.attention.sketch.G")}, file)
    rewrite(tmp_path / "export")
    assert "blocks.0.attention.sketch.G is absent there" in refusal(tmp_path / "export")


@pytest.mark.parametrize("hashes", ["old", "in order"])
def test_a_pickle_is_refused_and_not_run(export, tmp_path, hashes):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    (export / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    if hashes == "in order":
        rewrite(export)
    assert str(export / "model.safetensors") in refusal(export)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("folder", ["run", "run/checkpoints/step-00000007", "empty", "absent"])
def test_what_is_no_export(run, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    line = refusal(tmp_path / folder)
    assert str(tmp_path / folder / "config.json") in line and "tools/export.py" in line


@pytest.mark.parametrize("old, new, named", [
    ("\nmodel:\n", "\nmodel: {\n", "no config of a run"),
    ("\nmodel:\n", "\nmodle:\n", "no config of a run"),
    ("n_layers: 2", "n_experts: 2", "n_experts"),
    ("n_layers: 2", "n_layers: 3", "another model"),
])
def test_a_step_whose_config_cannot_be_used(run, old, new, named):
    step = run / "checkpoints/step-00000007"
    config_yaml, path = step / "config.yaml", step / "manifest.json"
    text = config_yaml.read_text()
    assert text.count(old) == 1
    config_yaml.write_text(text.replace(old, new))
    manifest = json.loads(path.read_text())
    manifest["files"]["config.yaml"] = {
        "size_bytes": config_yaml.stat().st_size, "sha256": sha256_of(config_yaml)}
    path.write_text(json.dumps(manifest | {"sha256": self_hash(manifest)}))
    line = refusal(run, open_pretrained)
    assert str(step) in line and named in line


# --- the output folder ---


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


@pytest.mark.parametrize("call", ["save_file", "shutil.copyfile", "sha256_of", "new_folder"])
def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        if call == "save_file":
            raise SafetensorError("No space left on device")
        raise OSError(28, "No space left on device")

    *owner, name = call.split(".")
    monkeypatch.setattr(shutil if owner else module, name, full)
    with pytest.raises(OSError, match="No space left"):
        write_export(run, tmp_path / "export")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_killed_at_any_moment(run, tmp_path, run_ranks, monkeypatch):
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
            assert "signal 9" in str(error)
            killed += 1
        if (tmp_path / "export").exists():
            load_pretrained(tmp_path / "export")
            shutil.rmtree(tmp_path / "export")
        write_export(run, tmp_path / "export")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]
        shutil.rmtree(tmp_path / "export")
    assert killed >= 8  # two files opened by Python, one mode, three files and two folders synced, one renaming
