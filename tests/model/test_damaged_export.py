"""Check that damage to an export, or a folder that is none, is named in one line."""

import json
import os
import pickle
import shutil
from dataclasses import asdict

import pytest
from safetensors.torch import load_file, save_file

from lcpt.checkpoint import CheckpointError
from lcpt.model import load_pretrained
from lcpt.model.pretrained import open_pretrained, write_export
from lcpt.utils.hashing import file_sha256, self_sha256
from tests.model.conftest import CONFIGS, FILES, config


def rewrite(export, **changes):
    """Change config.json as its own writer would: with its hashes in order."""
    path = export / "config.json"
    content = json.loads(path.read_text()) | changes
    for name in content["files"]:
        file = export / name
        content["files"][name] = {"size_bytes": file.stat().st_size, "sha256": file_sha256(file)}
    path.write_text(json.dumps(content | {"sha256": self_sha256(content)}))


def refusal(export, opened=load_pretrained) -> str:
    """The one line with which an export is refused."""
    with pytest.raises(CheckpointError) as caught:
        opened(export)
    line = str(caught.value)
    assert "\n" not in line and ";" in line  # what is wrong; what to do
    return line


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped bit", "longer"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named(export, file, how):
    path = export / file
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[:-1],
                "longer": content + b"x",
                "flipped bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            }[how]
        )
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


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "null",
        "{}",
        "not JSON",
        "\udcff",
        "[" * 100_000,
        '{"architectures": ["GPT2LMHeadModel"], "n_layer": 12}',
    ],
)
def test_json_that_is_no_export_config_is_refused(export, content):
    (export / "config.json").write_text(content, errors="surrogateescape")
    assert str(export / "config.json") in refusal(export)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"schema_version": 2}, "schema 2, this lcpt reads 1"),
        ({"schema_version": "1"}, "schema 1"),
        ({"quantisation": "int8"}, "quantisation"),
        ({"model": asdict(config()) | {"n_experts": 8}}, "n_experts"),
        ({"model": asdict(config()) | {"attention": {"kind": "flash"}}}, "'flash'"),
        ({"model": {"attention": {"polysketch": {"branches": 3}}}}, "model.attention.polysketch.branches"),
        ({"model": asdict(config()) | {"n_layers": 0}}, "model.n_layers is 0"),
        ({"model": asdict(config()) | {"n_layers": "two"}}, "model.n_layers"),
        ({"model": None}, "model"),
    ],
    ids=str,
)
def test_a_config_that_this_lcpt_does_not_know(export, changes, named):
    """Hashes in order: as a newer lcpt would write it."""
    rewrite(export, **changes)
    line = refusal(export)
    assert str(export / "config.json") in line and named in line and "lcpt" in line


def test_a_folder_of_transformers_is_told_its_way_in(export):
    (export / "config.json").write_text('{"model_type": "llama"}')
    assert f"lcpt import --from {export} --output EXPORT" in refusal(export)


def test_a_config_that_lacks_a_key_is_refused_by_name(export):
    path = export / "config.json"
    content = json.loads(path.read_text())
    del content["context"]
    path.write_text(json.dumps(content | {"sha256": self_sha256(content)}))
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


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"n_layers": 3}, "blocks.2.attention.gamma is absent there and [2] in the config"),
        ({"n_layers": 1}, "blocks.1.attention.gamma is [2] there and absent in the config"),
        ({"d_ff": 24}, "blocks.0.feed_forward.down.weight is [16, 40] there and [16, 24] in the config"),
    ],
    ids=str,
)
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


@pytest.mark.parametrize("folder", ["run", "run/checkpoints/step-00000007"])
def test_a_run_and_a_step_are_loaded_too(run, tmp_path, folder):
    assert load_pretrained(tmp_path / folder).config == open_pretrained(tmp_path / "run").model.config


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / folder} is no run folder" in refusal(tmp_path / folder)


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("\nmodel:\n", "\nmodel: {\n", "no config of a run"),
        ("\nmodel:\n", "\nmodle:\n", "no config of a run"),
        ("n_layers: 2", "n_experts: 2", "n_experts"),
        ("n_layers: 2", "n_layers: 3", "another model"),
        ("n_layers: 2", "n_layers: ${oc.env:HOME}", "refers to other values"),
    ],
)
def test_a_step_whose_config_cannot_be_used_is_named(run, old, new, named):
    step = run / "checkpoints/step-00000007"
    config_yaml, path = step / "config.yaml", step / "manifest.json"
    text = config_yaml.read_text()
    assert text.count(old) == 1
    config_yaml.write_text(text.replace(old, new))
    manifest = json.loads(path.read_text())
    manifest["files"]["config.yaml"] = {"size_bytes": config_yaml.stat().st_size, "sha256": file_sha256(config_yaml)}
    path.write_text(json.dumps(manifest | {"sha256": self_sha256(manifest)}))
    line = refusal(run, open_pretrained)
    assert str(step) in line and named in line
