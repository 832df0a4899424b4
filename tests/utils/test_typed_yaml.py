"""Config values mean what was written: text to the character, decimal numbers, ~ the home folder, items of lists."""

import pytest

from lcpt.config import ConfigError, load_config

MINIMAL = "run: {dir: runs/x}\ndata: {path: some/folder}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(MINIMAL)
    return path


def message(path, override) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    return str(caught.value)


@pytest.mark.parametrize(
    "given",
    ["1e3", "12e5", "007", "12:30:45", "on", "1.50", "1_000", "0x10", "runs/a #1", "[1]", "{a: b}", "'x'", "a=b"],
)
def test_a_text_key_takes_what_was_written(file, given):
    """Also one in a list, in a mapping, and in the file."""
    assert load_config(file, [f"run.dir={given}"]).run.dir == given
    assert load_config(file, [f"data.valid.books={given}"]).data.valid == {"books": given}
    listed = ["data.path=null", "data.sources=[{path: a, weight: 1}]", f"data.sources[0].path={given}"]
    assert load_config(file, listed).data.sources[0].path == given
    if given[0].isalnum() and "#" not in given:  # as a plain scalar in a file
        file.write_text(MINIMAL.replace("runs/x", given))
        assert load_config(file).run.dir == given


@pytest.mark.parametrize(
    "key, given, value",
    [
        ("training.max_steps", "010", 10),
        ("training.max_steps", "1_000", 1000),
        ("training.lr", "1e-3", 0.001),
        ("model.activation_checkpointing", "TRUE", True),
        ("model.activation_checkpointing", "offload", "offload"),
        ("data.mask_documents", "off", False),
        ("parallel.deepspeed", "{a: 010, b: 1e-3, c: true, d: x, e: [1, null]}", None),
    ],
)
def test_numbers_are_decimal_and_words_are_as_their_key_takes_them(file, key, given, value):
    if value is None:
        value = {"a": 10, "b": 0.001, "c": True, "d": "x", "e": [1, None]}
    section, name = key.split(".")
    overrides = ["training.warmup_steps=0"]
    assert getattr(getattr(load_config(file, [*overrides, f"{key}={given}"]), section), name) == value
    file.write_text(MINIMAL + ("" if section == "data" else f"{section}: {{{name}: {given}}}\n"))
    if section != "data":
        assert getattr(getattr(load_config(file, overrides), section), name) == value


@pytest.mark.parametrize("given", ["1:40", "0x10", "1.5", "ten", "[1]"])
def test_what_is_no_decimal_number_is_refused(file, given):
    assert "training.max_steps" in message(file, f"training.max_steps={given}")


def test_a_tilde_is_the_home_folder(file, monkeypatch):
    """In every key that takes a folder, in overrides and in the file."""
    monkeypatch.setenv("HOME", "/home/someone")
    keys = ["run.dir=~/a", "data.path=~/b", "data.valid={x: ~/c}", "training.init_from=~/d"]
    config = load_config(file, keys)
    assert (config.run.dir, config.data.path) == ("/home/someone/a", "/home/someone/b")
    assert (config.data.valid["x"], config.training.init_from) == ("/home/someone/c", "/home/someone/d")
    mixed = load_config(file, ["data.path=null", "data.sources=[{path: ~/e, weight: 1}]", "data.valid_path=~"])
    assert (mixed.data.sources[0].path, mixed.data.valid_path) == ("/home/someone/e", "/home/someone")
    file.write_text("run: {dir: ~/a}\ndata: {path: ./~/b}\n")
    assert (load_config(file).run.dir, load_config(file).data.path) == ("/home/someone/a", "./~/b")
    assert "no such home folder" in message(file, "run.dir=~nobody-of-that-name/x")


def test_an_item_of_a_list_can_be_set(file):
    file.write_text(MINIMAL + "model: {attention: {pattern: [softmax, kernel]}}\nphases: [{until_step: 20}, {}]\n")
    changed = load_config(file, ["model.attention.pattern[1]=flurka", "phases.0.until_step=30"])
    assert changed.model.attention.pattern == ["softmax", "flurka"] and changed.phases[0].until_step == 30
