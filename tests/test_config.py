import subprocess
import sys
from pathlib import Path

import pytest

from lcpt.config import ConfigError, load_config, to_yaml
from lcpt.data import SourceConfig

ROOT = Path(__file__).parents[1]
MINIMAL = "run: {dir: runs/x}\ndata: {path: some/folder}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(MINIMAL)
    return path


def message(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


def test_overrides_replace_defaults(file):
    config = load_config(file, ["training.lr=3e-3", "model.n_layers=2", "model.attention.pattern=[softmax,polysketch]"])
    assert (config.run.dir, config.data.path) == ("runs/x", "some/folder")
    assert (config.training.lr, config.model.n_layers) == (0.003, 2)
    assert config.model.attention.pattern == ["softmax", "polysketch"]
    assert config.sequences == config.training.global_batch_tokens // config.data.context


def test_the_last_override_wins(file):
    assert load_config(file, ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_an_override_beats_the_file(file):
    file.write_text(MINIMAL + "training: {lr: 1.0}\n")
    assert load_config(file).training.lr == 1.0
    assert load_config(file, ["training.lr=2"]).training.lr == 2.0


@pytest.mark.parametrize(
    "override, parts",
    [
        ("training.learning_rate=1", ["training.learning_rate"]),
        ("training.warmup_step=1", ["training.warmup_step", "did you mean warmup_steps?"]),
        ("trainin.lr=1", ["trainin", "did you mean training?"]),
        ("zzz=1", ["zzz", "known are", "training"]),
        ("model.attention.polysketch.siz=1", ["model.attention.polysketch.siz", "did you mean size?"]),
        ("model.attention.block_sise=1", ["did you mean block_size?"]),
    ],
)
def test_unknown_keys_are_named(file, override, parts):
    text = message(file, override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "override, key",
    [
        ("training.max_steps=many", "training.max_steps"),
        ("training.max_steps=1.5", "training.max_steps"),
        ("training.lr=fast", "training.lr"),
        ("training.betas=[a,b]", "training.betas"),
        ("training.betas=3", "training.betas"),
        ("model.activation_checkpointing=perhaps", "model.activation_checkpointing"),
        ("model.attention=softmax", "model.attention"),
        ("model.attention.key_shift=perhaps", "model.attention.key_shift"),
        ("model.version=old", "model.version"),
        ("model.d_model=null", "model.d_model"),
        ("training=5", "training"),
    ],
)
def test_wrong_types_are_named(file, override, key):
    assert key in message(file, override)


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["training.precision=bf16", "parallel.zero_stage=0"], ["training.precision bf16", "parallel.zero_stage"]),
        (["parallel.offload_optimizer=true", "parallel.zero_stage=0"], ["parallel.offload_optimizer"]),
    ],
)
def test_impossible_combinations_are_named(file, overrides, parts):
    text = message(file, *overrides)
    assert all(part in text for part in parts)


@pytest.mark.parametrize(
    "override, parts",
    [
        ("training.schedule=linear", ["training.schedule", "'linear'"]),
        ("training.precision=fp16", ["training.precision", "'fp16'"]),
        ("training.betas=[0.9]", ["training.betas"]),
        ("training.max_steps=0", ["training.max_steps", "0"]),
        ("run.seed=18446744073709551616", ["run.seed is 18446744073709551616", "below 2^63"]),
        ("run.seed=-1", ["run.seed is -1"]),
        ("training.warmup_steps=10000", ["training.warmup_steps", "10000"]),
        ("training.warmup_steps=-1", ["training.warmup_steps", "-1"]),
        ("training.lr=0", ["training.lr", "0"]),
        ("training.micro_batch=0", ["training.micro_batch"]),
        ("training.global_batch_tokens=10000", ["training.global_batch_tokens", "10000", "8192"]),
        ("training.valid_tokens=0", ["training.valid_tokens", "0"]),
        ("training.sample_every_steps=0", ["training.sample_every_steps", "0"]),
        ("data.context=0", ["data.context", "0"]),
        ("model.n_heads=7", ["n_heads", "7"]),
        ("model.n_kv_heads=5", ["n_kv_heads", "5"]),
        ("model.attention.kind=flash", ["model.attention", "'flash'"]),
        ("model.attention.pattern=[softmax,flash]", ["'flash'"]),
        ("model.attention.polynomial.degree=3", ["model.attention.polynomial.degree", "3"]),
        ("model.attention.polynomial.shift=-1", ["model.attention.polynomial.shift", "-1"]),
        ("model.attention.polysketch.shift=-1", ["model.attention.polysketch.shift", "-1"]),
        ("model.attention.polysketch.shift=inf", ["model.attention.polysketch.shift", "inf"]),
        ("model.attention.polysketch.shift=0", ["model.attention.polysketch.shift is 0", "needs a constant"]),
        ("model.attention.polysketch.size=1", ["model.attention.polysketch.size is 1", "too small for a constant"]),
        ("model.version=3", ["model.version is 3", "1 to 2"]),
        ("model.attention.polysketch.sketch=count", ["model.attention.polysketch.sketch", "'count'"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage", "4"]),
        ("checkpoint.every_steps=0", ["checkpoint.every_steps", "0"]),
        ("checkpoint.every_minutes=0", ["checkpoint.every_minutes", "0"]),
        ("checkpoint.keep_last=0", ["checkpoint.keep_last", "0"]),
        ("checkpoint.milestone_steps=0", ["checkpoint.milestone_steps", "0"]),
        ("training.bad_steps.allowed=-1", ["training.bad_steps.allowed", "-1"]),
        ("training.bad_steps.sigmas=-1", ["training.bad_steps.sigmas", "-1"]),
        ("training.hang_seconds=-1", ["training.hang_seconds", "-1"]),
    ],
)
def test_impossible_values_are_named(file, override, parts):
    text = message(file, override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "override",
    [
        "training.lr=nan",
        "training.lr=inf",
        "training.stop_after_steps=0",
        "training.stop_after_steps=-1",
        "training.grad_clip=-1",
        "training.weight_decay=-1",
        "training.betas=[0.9,1.5]",
        "training.decay_fraction=2",
        "training.final_lr_fraction=-1",
        "model.rope_base=0",
    ],
)
def test_numbers_outside_their_range_are_named(file, override):
    assert override.partition("=")[0] in message(file, override)


@pytest.mark.parametrize("override", ["training.lr", "fast", ""])
def test_an_override_without_a_value_is_named(file, override):
    assert repr(override) in message(file, override)


@pytest.mark.parametrize(
    "override",
    [
        "=5",
        ".=1",
        "training..lr=1",
        "a.b.c.d=1",
        "training.lr.x=1",
        "run.dir=${nothing}",
        "training.betas=[",
        "a={b",
    ],
)
def test_odd_overrides_are_one_line(file, override):
    message(file, override)


def test_a_missing_config_file_is_named(tmp_path):
    assert "nothing.yaml" in message(tmp_path / "nothing.yaml")
    assert str(tmp_path) in message(tmp_path)


@pytest.mark.parametrize(
    "given, missing",
    [
        ("run: {dir: x}", "data.path"),
        ("data: {path: x}", "run.dir"),
        ("", "run.dir"),
        ("", "data.path"),
        ("run: {dir: x}\ndata: {sources: [{path: a}]}", "data.sources[0].weight"),
        ("run: {dir: x}\ndata: {sources: [{weight: 1}]}", "data.sources[0].path"),
    ],
)
def test_a_missing_key_is_named(file, given, missing):
    file.write_text(given)
    text = message(file)
    assert missing in text and "experiment.yaml" in text


@pytest.mark.parametrize(
    "content",
    [
        b"run: [",
        b"run: {dir: x}\n\tdata: 3",
        b"a: b: c",
        b"- a\n- b",
        b"just a word",
        b"\xff\xfe\x00",
        b"run: {dir: x}\nrun: {dir: y}",
    ],
)
def test_unreadable_yaml_is_named(file, content):
    file.write_bytes(content)
    assert "experiment.yaml" in message(file)


MIXED = "data.sources=[{path: a, weight: 0.75, max_repeats: 2}, {path: b, weight: 0.25}]"


def test_sources_take_the_place_of_a_path(file):
    file.write_text("run: {dir: x}")
    config = load_config(file, [MIXED])
    assert config.data.path is None
    assert config.data.sources == [SourceConfig("a", 0.75, 2.0), SourceConfig("b", 0.25)]
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    changed = load_config(file, ["data.sources=null", "data.path=c"])
    assert (changed.data.path, changed.data.sources) == ("c", None)


@pytest.mark.parametrize(
    "given, parts",
    [
        ([MIXED, "data.path=c"], ["data.path and data.sources are both set"]),
        (["data.path=null"], ["neither data.path nor data.sources"]),
        (["data.sources=[]"], ["data.sources is empty"]),
        (["data.sources=5"], ["data.sources"]),
        (["data.sources={path: a, weight: 1}"], ["data.sources is a list"]),
        (["model.attention.pattern={a: b}"], ["model.attention.pattern is a list"]),
        (["data.sources=[a, b]"], ["data.sources[0]"]),
        (["data.sources=[null]"], ["data.sources[0]"]),
        (["data.sources=[{path: a, wieght: 1}]"], ["data.sources[0].wieght", "path, weight, max_repeats"]),
        (["data.sources=[{path: a, weight: 1}, {path: b, weight: x}]"], ["data.sources[1].weight", "'x'"]),
        (["data.sources=[{path: a, weight: 0.9}]"], ["add up to 0.9"]),
        (["data.sources=[{path: a, weight: -1}, {path: b, weight: 2}]"], ["data.sources: a has weight -1"]),
        (["data.sources=[{path: a, weight: 1, max_repeats: 0}]"], ["data.sources: a has max_repeats 0"]),
        (["data.sources=[{path: synthetic:mqar, weight: 1}]"], ["data.sources: synthetic:mqar is a task"]),
        (
            [MIXED, "data.valid_path=synthetic:mqar"],
            ["data.valid_path is synthetic:mqar", "data.sources a 0.75, b 0.25"],
        ),
        ([MIXED, "data.sources[0].weight=0.5"], ["add up to 0.75"]),
    ],
)
def test_sources_that_cannot_be_are_named(file, given, parts):
    file.write_text("run: {dir: x}")
    text = message(file, *given)
    assert all(part in text for part in parts), text


def test_validation_sets_have_names_and_an_order(file):
    file.write_text("run: {dir: x}\ndata: {path: a, valid: {web: b, books: c}}")
    config = load_config(file, ["data.valid.code=d"])
    assert list(config.data.valid_sets.items()) == [("web", "b"), ("books", "c"), ("code", "d")]
    file.write_text(to_yaml(config))
    assert load_config(file) == config and list(load_config(file).data.valid_sets) == ["web", "books", "code"]
    assert load_config(file, ["data.valid=null", "data.valid_path=e"]).data.valid_sets == {"": "e"}
    assert load_config(file, ["data.valid=null"]).data.valid_sets == {}


@pytest.mark.parametrize(
    "given, parts",
    [
        (["data.valid={a: b}", "data.valid_path=c"], ["data.valid_path and data.valid are both set"]),
        (["data.valid={a: b, c: d, a: e}"], ["override 'data.valid={a: b, c: d, a: e}'", "duplicate key a"]),
        (["data.valid=b"], ["data.valid is a mapping", "write b as one"]),
        (["data.valid=[b]"], ["data.valid is a mapping"]),
        (["data.valid={a: null}"], ["data.valid.a"]),
        (["data.valid={a: {b: c}}"], ["data.valid.a is"]),
        (["data.valid={'': b}"], ["data.valid: ''", "name"]),
        (["data.valid={a b: c}"], ["data.valid: 'a b'"]),
        (["data.valid={a/b: c}"], ["data.valid: 'a/b'"]),
        (["data.valid={a: b, c: synthetic:mqar}"], ["data.valid.c is synthetic:mqar", "training takes a"]),
    ],
)
def test_validation_sets_that_cannot_be_are_named(file, given, parts):
    file.write_text("run: {dir: x}\ndata: {path: a}")
    text = message(file, *given)
    assert all(part in text for part in parts), text


def test_one_name_of_two_validation_sets_is_named_with_its_line(file, monkeypatch):
    file.write_text("run: {dir: x}\ndata:\n  path: a\n  valid:\n    books: b\n    code: c\n    books: d\n")
    monkeypatch.chdir(file.parent)
    for path in (file, file.name):
        assert "experiment.yaml, line 7: found duplicate key books" in message(path)


@pytest.mark.parametrize(
    "given, text",
    [
        ("phases=3", "phases is a list, such as [a, b]; write 3 as one"),
        ("phases[2].until_step=5", "override 'phases[2].until_step=5': the list has no such item"),
        ("data.sources.1.weight=0.5", "override 'data.sources.1.weight=0.5': the list has no such item"),
        ("phases=[{until_step: 3, data: [a]}, {}]", "phases[0].data is a mapping"),
        ("phases=[{until_step: 3}, null]", "phases[1] is a section with until_step"),
        ("phases=[{until_step: x}, {}]", "phases[0].until_step: "),
        ("phases=[{data: {sources: {a: 1}}}]", "phases, number 1: data.sources is a list"),
        ("phases=[{data: {sources: [{path: a, wight: 1}]}}]", "number 1: unknown key data.sources[0].wight"),
        ("phases=[{model: {rope_scaling: linear}}]", "number 1: model.rope_scaling is a section"),
    ],
)
def test_what_does_not_fit_in_a_list_is_named(file, given, text):
    file.write_text("run: {dir: x}\ndata: {sources: [{path: a, weight: 1}]}\nphases: [{until_step: 2}, {}]")
    found = message(file, given)
    assert text in found and "\n" not in found


def test_text_is_validated_on_few_labels_and_a_task_on_whole_samples(file):
    """Of text a window is as long as it must be."""
    few = ["training.valid_tokens=5", "data.context=64", "training.global_batch_tokens=128", "model.vocab_size=256"]
    assert load_config(file, few).training.valid_tokens == 5
    task = ["data.path=synthetic:mqar", "data.valid_path=null", "data.valid={m: synthetic:mqar}"]
    text = message(file, *few, *task)
    sampling = message(file, *few, *task, "training.sample_every_steps=5")
    assert "training.sample_every_steps needs text, and synthetic:mqar has none" in sampling
    assert "training.valid_tokens 5 is less than a sample of synthetic:mqar, data.context 64" in text


def test_to_yaml_round_trips(file):
    overrides = [
        "training.lr=3.3e-5",
        "model.n_kv_heads=4",
        "model.attention.pattern=[softmax]",
        "training.betas=[0.8,0.9]",
        "training.stop_after_steps=7",
        "data.valid_path=other",
        "model.attention.polysketch.sketch=gaussian",
    ]
    config = load_config(file, overrides)
    file.write_text(to_yaml(config))
    assert load_config(file) == config
    assert to_yaml(load_config(file)) == to_yaml(config)


def test_importing_it_is_light():
    """Neither deepspeed nor triton, which take seconds and need a compiler or a GPU."""
    code = "import sys, lcpt.config; print({'deepspeed', 'triton'} & {name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads(path):
    config = load_config(path)
    assert config.sequences >= 1
