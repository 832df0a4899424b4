"""The model card says what the files beside the weights say, and nothing else."""

import json

import pytest
import yaml
from omegaconf import OmegaConf

from lcpt.data.manifest import fingerprint_of, load_manifest
from lcpt.model.huggingface.card import check_license, model_card
from lcpt.model.huggingface.export import write_hf_export
from lcpt.model.pretrained import open_pretrained
from lcpt.utils.hashing import file_sha256, self_sha256
from tests.model.conftest import config


@pytest.fixture
def trained_run(make_run, train_folder):
    """A run whose files name its data, and its step 7."""
    run, _ = make_run()
    step = run / "checkpoints/step-00000007"
    config = OmegaConf.load(step / "config.yaml")
    OmegaConf.update(config, "data.path", str(train_folder))
    (step / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (step / "tokenizer.model").write_bytes((train_folder / "tokenizer.model").read_bytes())
    state = json.loads((step / "state.json").read_text())
    state["data fingerprint"] = fingerprint_of(load_manifest(train_folder))
    (step / "state.json").write_text(json.dumps(state))
    manifest = json.loads((step / "manifest.json").read_text())
    for name in ("config.yaml", "tokenizer.model", "state.json"):
        file = step / name
        manifest["files"][name] = {"size_bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (step / "manifest.json").write_text(json.dumps(manifest | {"sha256": self_sha256(manifest)}))
    return run


def rows_of(card: str, heading: str) -> dict[str, str]:
    """The table below a heading."""
    section = card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2 and cells[0] != "---"}


def card_of(source, license=None) -> str:
    return model_card(open_pretrained(source), "mine", license)


def header_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_header_and_licence(trained_run):
    card = card_of(trained_run)
    assert header_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lcpt", "custom_code"],
    }
    assert "\n## Licence\n\nOf the weights: not stated. Ask whoever gave you this model" in card
    card = card_of(trained_run, "apache-2.0")
    assert header_of(card)["license"] == "apache-2.0" and card.endswith("Of the weights: `apache-2.0`\n")


def test_a_run_without_figures_has_none(trained_run):
    card = card_of(trained_run)
    assert rows_of(card, "Figures") == {} and "None were at hand when this model was exported." in card
    assert rows_of(card, "Training") | {"steps": "7", "tokens": "700", "context": "64"} == rows_of(card, "Training")


def test_data_are_those_that_it_was_trained_on(trained_run, train_folder, tmp_path):
    """Its name, and its size if the manifest there is the run's own; no path of this machine."""
    shards = load_manifest(train_folder)["shards"]
    card = card_of(trained_run)
    assert rows_of(card, "Data") == {
        "folder": "data",
        **{key: f"{sum(shard[key] for shard in shards):,}" for key in ("documents", "tokens", "bytes")},
    }
    assert str(train_folder.parent) not in card and str(tmp_path) not in card
    step = trained_run / "checkpoints/step-00000007"
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps(state | {"data fingerprint": "other"}))
    manifest = json.loads((step / "manifest.json").read_text())
    file = step / "state.json"
    manifest["files"]["state.json"] = {"size_bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (step / "manifest.json").write_text(json.dumps(manifest | {"sha256": self_sha256(manifest)}))
    assert rows_of(card_of(trained_run), "Data") == {"folder": "data"}


def test_figures_are_those_of_this_step(trained_run):
    summary = {"step": 7, "loss": 5.0, "valid_loss": 4.56789123}
    evaluation = {
        "step": 7,
        "data": "/home/me/held-out.jsonl",
        "bits_per_byte": 2.25,
        "perplexity": 215.3,
        "tokens_scored": 158288,
        "window": 64,
        "precision": "fp32",
    }
    (trained_run / "summary.json").write_text(json.dumps(summary))
    (trained_run / "evaluation.json").write_text(json.dumps(evaluation))
    card = card_of(trained_run)
    assert rows_of(card, "Figures") == {
        "training loss, nats a token": "5",
        "validation loss": "4.5679",
        "bits per byte of held-out.jsonl": "2.25",
        "perplexity of held-out.jsonl": "215.3",
        "tokens scored": "158,288",
        "window, tokens": "64",
        "precision of scoring": "fp32",
    }
    assert "/home/me" not in card
    for name, content in (("summary.json", summary), ("evaluation.json", evaluation)):
        (trained_run / name).write_text(json.dumps(content | {"step": 8}))
    assert rows_of(card_of(trained_run), "Figures") == {}


def test_broken_figures_are_left_out(trained_run):
    (trained_run / "summary.json").write_text("{")
    (trained_run / "evaluation.json").write_text("[]")
    assert rows_of(card_of(trained_run), "Figures") == {}


def test_an_export_says_that_it_does_not_know(make_export):
    folder, model = make_export()
    card = (folder / "README.md").read_text()
    assert "The files that this model was exported from do not say." in card and "# mine\n" in card
    assert rows_of(card, "Training") == {"steps": "7", "tokens": "700", "context": "64"}
    rows = rows_of(card, "Model")
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert (rows["attention, by layers"], rows["vocabulary"]) == ("polysketch", "50")


def test_the_example_in_it_runs(make_export, tmp_path, monkeypatch, capsys):
    folder, _ = make_export(config(vocab_size=330))
    example = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    code = compile(example.replace("max_new_tokens=50", "max_new_tokens=3"), "README.md", "exec")
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.parametrize("license", ["", "a b", "mit\nname: x", "`", "-"])
def test_a_license_that_is_no_identifier_is_refused(license):
    with pytest.raises(ValueError, match="is no identifier; give one such as apache-2.0"):
        check_license(license)


def test_the_card_of_a_run_is_in_the_export(trained_run, tmp_path):
    write_hf_export(trained_run, tmp_path / "mine", license="mit")
    assert (tmp_path / "mine/README.md").read_text() == card_of(trained_run, "mit")
