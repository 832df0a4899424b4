"""Weights saved by an earlier lcpt stay the models that they were; saved-at-version-1 holds a step and an export of it.

They are of commit 9542816: polysketch, polynomial, flurka and softmax layers after three steps, and the logits that it
computed.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from lcpt.config import ConfigError, load_config, to_yaml
from lcpt.model import ModelConfig, load_pretrained
from lcpt.model.config_version import BEFORE, VERSION, upgrade_saved
from lcpt.model.pretrained import model_config
from lcpt.training.phases import divide
from lcpt.training.same_run import check_same_data, check_same_run

SAVED = Path(__file__).parent / "saved-at-version-1"
STEP = SAVED / "step-00000003"


@pytest.mark.parametrize("source", ["step", "export"])
def test_an_old_model_computes_what_it_did(source):
    model = load_pretrained(SAVED / "export" if source == "export" else STEP)
    own = model.config.attention
    assert (own.key_shift, own.polynomial.shift, own.polysketch.shift, own.polysketch.sketch) == (
        False,
        0,
        0,
        "learned",
    )
    logits = model(torch.arange(40)[None] * 7 % 400)[0, -1]
    expected = torch.tensor(json.loads((SAVED / "logits.json").read_text()))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-6)


def load_saved(*overrides):
    """-> its config, its phases, and them with data."""
    config = load_config(STEP / "config.yaml", overrides)
    state, phases = json.loads((STEP / "state.json").read_text()), divide(config)
    source = SimpleNamespace(fingerprint=state["data fingerprint"])
    opened = SimpleNamespace(source=source, config=config, last_step=phases[0].last_step, drawn=lambda step: {})
    return config, phases, [opened]


def test_an_old_run_goes_on_with_the_defaults_of_its_day():
    """Its config.yaml, or the YAML that it came from, has no version, and so has today's defaults; and its documents
    saw one another."""
    config, phases, opened = load_saved("model.version=1", "data.mask_documents=false")
    check_same_run(STEP, config, phases)
    check_same_data(STEP, opened)
    with pytest.raises(
        ValueError, match=r"key_shift False, this is True;.* model.version=1 gives the defaults of that"
    ):
        check_same_run(STEP, *load_saved()[:2])
    with pytest.raises(ValueError, match=r"data.mask_documents False, this is True; .*name another run.dir"):
        check_same_run(STEP, *load_saved("model.version=1")[:2])


def test_a_hand_written_config_has_the_defaults_of_today(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {dir: r}\ndata: {path: d}\nmodel: {attention: {polysketch: {size: 8}}}\n")
    config = load_config(tmp_path / "a.yaml")
    assert config.model == ModelConfig(attention=config.model.attention) and config.model.version == VERSION
    assert config.model.attention.key_shift and config.model.attention.polysketch.shift == 1
    old = load_config(tmp_path / "a.yaml", ["model.version=1", "model.attention.polynomial.shift=0.5"]).model
    assert old.attention.polysketch.sketch == "learned" and not old.attention.key_shift
    assert (old.attention.polynomial.shift, old.attention.polysketch.size, old.version) == (0.5, 8, VERSION)
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "b.yaml") == config


def test_a_saved_config_keeps_what_it_says():
    section = OmegaConf.to_container(OmegaConf.structured(ModelConfig()))
    section["attention"]["key_shift"] = False
    assert model_config(section, STEP) == model_config({**section, "version": VERSION}, STEP)
    assert not model_config(section, STEP).attention.key_shift
    assert model_config(section, STEP).attention.polysketch.sketch == "linear"


def test_every_version_has_its_list():
    assert list(BEFORE) == list(range(2, VERSION + 1))
    defaults = OmegaConf.structured(ModelConfig())
    for key in (key for keys in BEFORE.values() for key in keys):
        assert OmegaConf.select(defaults, key, throw_on_missing=True) is not None, key
    assert upgrade_saved({}).version == VERSION


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_an_unknown_version_is_named(version):
    with pytest.raises(ConfigError, match=f"model.version is {version}"):
        load_saved(f"model.version={version}")
