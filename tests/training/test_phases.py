"""A run in phases: what each is made of, that no document is repeated or left out at a border, and runs that go on."""

import json

import numpy as np
import pytest

from lcpt.checkpoint import find_checkpoint, read_state
from lcpt.config import ConfigError, load_config
from lcpt.data import Corpus, DataError, batch
from lcpt.data.order import n_windows, window_start
from lcpt.model.pretrained import open_pretrained
from lcpt.training.phase_data import open_phases
from lcpt.training.phases import divide, phase_of
from lcpt.training.schedule import Schedule, learning_rate
from lcpt.training.watchdog import Watchdog

STEPS = 8


@pytest.fixture(scope="module")
def folders(make_corpus, train_folder):
    """The training folder, one of sentences and a small one, all of one tokenizer."""
    tokenizer = train_folder / "tokenizer.model"
    sentences = make_corpus(seed=7, tokenizer=tokenizer, sentences=1, count=300)
    return [str(x) for x in (train_folder, sentences, make_corpus(seed=8, tokenizer=tokenizer, sentences=60))]


@pytest.fixture(scope="module")
def phased(folders):
    """Overrides: a longer context each time, other sources, another batch, another RoPE base, a last warm-up."""
    first, second, third = folders
    mixed = f"sources: [{{path: {first}, weight: 0.4}}, {{path: {second}, weight: 0.6}}]"
    others = f"sources: [{{path: {second}, weight: 0.3}}, {{path: {third}, weight: 0.7}}]"
    return [
        f"training.max_steps={STEPS}",
        "phases=["
        f"{{until_step: 3, data: {{{mixed}, context: 16}}}}, "
        f"{{until_step: 6, data: {{{others}, context: 32}}, training: {{global_batch_tokens: 512, micro_batch: 4}}}}, "
        f"{{data: {{context: 64}}, training: {{lr: 0.001, warmup_steps: 1}}, model: {{rope_base: 50000.0}}}}]",
    ]


def configured(yaml, *overrides):
    return load_config(yaml, ["run.dir=none", *overrides])


def opened(config):
    phases = divide(config)
    return open_phases(phases, [1] * len(phases), hashed=False, before={})


def test_phases_end_by_step_or_by_tokens(tiny_yaml):
    by_step = divide(configured(tiny_yaml, "training.max_steps=20", "phases=[{until_step: 8}, {until_step: 9}, {}]"))
    assert [(p.first_step, p.last_step, p.tokens_before) for p in by_step] == [(1, 8, 0), (9, 9, 2048), (10, 20, 2304)]
    by_tokens = divide(
        configured(
            tiny_yaml,
            "training.max_steps=20",
            "phases=[{until_tokens: 2048}, {until_tokens: 2560, training: {global_batch_tokens: 64}}, "
            "{training: {global_batch_tokens: 1024}}]",
        )
    )
    spans = [(p.first_step, p.last_step, p.tokens_before) for p in by_tokens]
    assert spans == [(1, 8, 0), (9, 16, 2048), (17, 20, 2560)] and by_tokens[-1].tokens_after(20) == 2560 + 4096
    rounded = divide(
        configured(tiny_yaml, "training.max_steps=9", "phases=[{until_tokens: 257}, {until_tokens: 2300}]")
    )
    assert [p.last_step for p in rounded] == [2, 9]
    [whole] = divide(configured(tiny_yaml))
    assert (whole.first_step, whole.last_step, whole.name) == (1, 6, "")


def test_a_phase_is_the_config_with_some_keys_changed(tiny_yaml, phased, folders):
    config = configured(tiny_yaml, *phased)
    first, second, third = (phase.config for phase in divide(config))
    assert (first.data.path, [source.path for source in first.data.sources]) == (None, folders[:2])
    assert (third.data.path, third.data.sources, third.data.context) == (folders[0], None, 64)
    assert (second.training.global_batch_tokens, third.training.global_batch_tokens) == (512, 256)
    assert (second.model.rope_base, third.model.rope_base) == (10000, 50000)
    assert second.training.lr == config.training.lr == 0.003 and third.training.lr == 0.001


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["phases=[{until_step: 3}, {until_step: 3}, {}]"], ["number 2", "ends at step 3", "after step 3"]),
        (["phases=[{until_tokens: 600}, {until_tokens: 300}, {}]"], ["number 2", "300 tokens", "768 tokens"]),
        (["phases=[{until_step: 3}, {until_tokens: 600}, {}]"], ["until_step", "until_tokens", "one of them"]),
        (["phases=[{until_step: 3, until_tokens: 600}, {}]"], ["until_step", "until_tokens", "both"]),
        (["phases=[{}, {}]"], ["number 1", "where it ends"]),
        (["phases=[{until_step: 0}, {}]"], ["number 1", "step 0"]),
        (["phases=[{until_step: 3}, {until_step: 5}]"], ["number 2", "step 5", "max_steps is 6"]),
        (["phases=[{until_step: 6}, {}]"], ["number 1", "step 6", "max_steps is 6"]),
        (["phases=[{until_tokens: 99999}, {}]"], ["number 1", "max_steps is 6"]),
        (["phases=[{until_step: 3, data: {context: 48}}, {}]"], ["number 1", "global_batch_tokens 256", "48"]),
        (["phases=[{until_step: 3, data: {contxt: 64}}, {}]"], ["data.contxt", "context"]),
        (["phases=[{until_step: 3, data: {context: many}}, {}]"], ["number 1", "data.context", "many"]),
        (["phases=[{until_step: 3, training: {precision: bf16}}, {}]"], ["training.precision", "cannot change"]),
        (["phases=[{until_step: 3, model: {n_layers: 3}}, {}]"], ["model.n_layers", "cannot change"]),
        (["phases=[{until_step: 3, data: {sources: []}}, {}]"], ["number 1", "data.sources is empty"]),
        (["phases=[{until_step: 2, training: {lr: 0.1, warmup_steps: 2}}, {}]"], ["number 1", "warmup_steps is 2"]),
        (["phases=[{until: 3}, {}]"], ["phases[0].until", "until_step"]),
        (["training.schedule_counts=epochs"], ["steps or tokens"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) and x[0].startswith(("phases", "training")) else "",
)
def test_phases_that_cannot_be_are_refused_in_one_line(tiny_yaml, overrides, parts):
    with pytest.raises(ConfigError) as caught:
        configured(tiny_yaml, *overrides)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_a_phase_has_a_schedule_of_its_own_or_that_of_the_run(tiny_yaml, phased):
    config = configured(tiny_yaml, *phased)
    phases = divide(config)
    rates = [Schedule(config.training, phases).rate(step) for step in range(1, STEPS + 1)]
    assert rates[:6] == [learning_rate(step, config.training) for step in range(6)]
    assert rates[6:] == pytest.approx([0.001, 0.0001])  # warm after one step; the end of a cosine
    plain = configured(tiny_yaml, "training.schedule_counts=tokens")
    counted = Schedule(plain.training, divide(plain))
    assert [counted.rate(s + 1) for s in range(6)] == pytest.approx(
        [learning_rate(s, plain.training) for s in range(6)]
    )


def test_a_schedule_that_counts_tokens_falls_with_them(tiny_yaml):
    """Steps of 256 tokens, then of 768: a linear fall from the end of the warm-up to the last token."""
    config = configured(
        tiny_yaml,
        "training.schedule=wsd",
        "training.decay_fraction=1",
        "training.final_lr_fraction=0",
        "training.schedule_counts=tokens",
        "training.max_steps=6",
        "phases=[{until_step: 4}, {training: {global_batch_tokens: 768}}]",
    )
    schedule = Schedule(config.training, divide(config))
    rates = [schedule.rate(step) / config.training.lr for step in range(1, 7)]
    assert rates == pytest.approx([0.5, 1, 7 / 8, 6 / 8, 3 / 8, 0])  # 8 batches of 256 after the warm-up


def test_no_token_is_repeated_or_left_out_at_a_border(tiny_yaml, phased, folders):
    """Every folder gives its order of windows, of the longest context it is ever used in, from the first token on."""
    config = configured(tiny_yaml, *phased)
    streams = {folder: [] for folder in folders}
    for phase in opened(config):
        parts = getattr(phase.source, "parts", [phase.source])
        for number in range(phase.samples(phase.last_step)):
            before, after = (phase.source.drawn(n, phase.config.data.context) for n in (number, number + 1))
            [folder] = [path for path in after if before[path].tokens != after[path].tokens]
            sample = phase.source.sample(number, config.run.seed, phase.config.data.context)
            real = phase.config.data.context - sample.padding
            assert after[folder].tokens - before[folder].tokens == real and (sample.labels[real:] == -1).all()
            assert not sample.padding or sample.starts[-1] == real  # what is missing is apart
            streams[folder].append(sample.inputs[:real])
        assert {str(part.folder) for part in parts} <= streams.keys()
    longest = dict(zip(folders, (64, 32, 32), strict=True))
    for folder, found in streams.items():
        corpus, window = Corpus(folder), longest[folder]
        joined = np.concatenate(found)
        starts = [
            window_start(n, corpus.tokens, window, config.run.seed, corpus.fingerprint)
            for n in range(-(-len(joined) // window))
        ]
        expected = np.concatenate([corpus.read(start, start + window) for start in starts])
        np.testing.assert_array_equal(joined, expected[: len(joined)])
    drawn = phase.drawn(STEPS)
    assert {path: each.tokens for path, each in drawn.items()} == {p: sum(map(len, x)) for p, x in streams.items()}
    assert any(len(part) % 16 or len(part) < 64 for part in streams[folders[0]])


def test_one_phase_after_another_of_the_same_settings_is_one_run(tiny_yaml):
    whole, cut = configured(tiny_yaml), configured(tiny_yaml, "phases=[{until_step: 2}, {until_step: 3}, {}]")
    [only], parts = opened(whole), opened(cut)
    for step in range(1, 7):
        part = phase_of(parts, step)
        number = step - part.phase.first_step
        np.testing.assert_array_equal(
            batch(part.source, 0, number, 8, 32).inputs, batch(only.source, 0, step - 1, 8, 32).inputs
        )
        assert part.drawn(step) == only.drawn(step) and part.documents(step) == only.documents(step)


def test_a_folder_of_two_names_is_one(tiny_yaml, folders):
    """It goes on where it was, in the windows of the longer context."""
    alias = folders[0].replace("/data", "/./data")
    first, second = opened(
        configured(tiny_yaml, f"phases=[{{until_step: 3}}, {{data: {{path: {alias}, context: 64}}}}]")
    )
    assert alias != folders[0] and first.drawn(3)[folders[0]].order == "windows of 64"
    [drawn] = second.drawn(6).values()
    assert (drawn.tokens, drawn.passed) == (6 * 256, 0)


def test_only_windows_must_divide_the_longest(tiny_yaml):
    """A phase that packs takes any context; tokens that it passes over were not trained on."""
    packed = "{data: {packing: best_fit, context: 48}, training: {global_batch_tokens: 192}}"
    first, second = opened(configured(tiny_yaml, f"phases=[{{until_step: 3}}, {packed}]"))
    assert first.drawn(3) == opened(configured(tiny_yaml))[0].drawn(3)
    [drawn] = second.drawn(6).values()
    assert drawn.passed > 0 and drawn.tokens - drawn.passed == 3 * 256 + 3 * 192


@pytest.mark.parametrize(
    "phase, parts",
    [
        ("{data: {context: 48}, training: {global_batch_tokens: 192}}", ["phase 1", "context 32", "divide 48"]),
        ("{data: {context: 65536}, training: {global_batch_tokens: 65536}}", ["phase", "{folder}: ", "65,536 + 1"]),
        ("{data: {path: 'synthetic:mqar', context: 64}}", ["phase 2", "synthetic:mqar and {folder}", "task and text"]),
    ],
)
def test_what_a_phase_cannot_be_made_of_is_named(tiny_yaml, folders, phase, parts):
    config = configured(tiny_yaml, "training.valid_tokens=65536", f"phases=[{{until_step: 3}}, {phase}]")
    with pytest.raises(DataError) as caught:
        opened(config)
    assert all(part.format(folder=folders[0]) in str(caught.value) for part in parts), caught.value


def test_a_dry_run_shows_every_phase(tiny_yaml, phased):
    from lcpt.training.dry_run import describe

    shown = describe(configured(tiny_yaml, *phased), world=2)
    first, second, third = (line for line in shown.splitlines() if line.startswith("phase "))
    assert "1, steps 1 to 3, up to 768 tokens" in first and "data.context 16, 256 tokens a step" in first
    assert "2, steps 4 to 6, up to 2,304 tokens" in second and "512 tokens a step" in second
    assert "data.context 64" in third and third.endswith("a schedule of its own")
    assert shown.count("parameters ") == shown.count("FLOPs of the phase ") == 3 and "1,536 tokens in 3 steps" in shown
    assert "phase" not in describe(configured(tiny_yaml), world=2)


def test_another_order_goes_on_with_the_next_epoch(folders, tiny_yaml):
    """A folder that a run has used in shorter windows."""
    [before] = opened(configured(tiny_yaml))
    drawn = before.drawn(6)
    [after] = open_phases(divide(configured(tiny_yaml, "data.context=64")), [1], hashed=False, before=drawn)
    epoch = n_windows(Corpus(folders[0]).tokens, 64) * 64
    assert 0 < drawn[folders[0]].epochs < 1 and after.drawn(0)[folders[0]].tokens == epoch
    start = window_start(epoch // 64, Corpus(folders[0]).tokens, 64, 3, after.source.fingerprint)
    found = after.source.sample(0, 3, 64).inputs
    np.testing.assert_array_equal(found, Corpus(folders[0]).read(start, start + 64))


@pytest.fixture(scope="module")
def whole(train_ranks, phased):
    return train_ranks(1, *phased, "checkpoint.every_steps=1", "checkpoint.keep_last=100")


def test_rows_tell_of_the_phases(whole, folders):
    assert [row["tokens"] for row in whole.rows] == [256, 512, 768, 1280, 1792, 2304, 2560, 2816]
    assert sum(whole.rows[2]["source_tokens"].values()) == 768
    assert set(whole.rows[2]["source_tokens"]) == set(folders[:2]) and set(whole.rows[4]["source_tokens"]) == set(
        folders
    )
    tokens = np.diff([0, *(row["tokens"] for row in whole.rows)])
    padding = sum(row["padding_fraction"] * n for row, n in zip(whole.rows, tokens, strict=True))
    assert 0 < padding == pytest.approx(2816 - sum(whole.rows[-1]["source_tokens"].values()))
    assert [row["learning_rate"] for row in whole.rows[6:]] == pytest.approx([0.001, 0.0001])


@pytest.mark.parametrize("world, stage, stop, other_world", [(2, 1, 3, 1), (2, 3, 5, 2), (4, 2, 6, 2), (1, 0, 7, 4)])
def test_ranks_stages_and_resume_change_nothing(train_ranks, phased, whole, world, stage, stop, other_world):
    settings = [*phased, f"parallel.zero_stage={stage}"]
    first = train_ranks(world, *settings, f"training.stop_after_steps={stop}")
    again = train_ranks(other_world, *settings, dir=first.dir)
    assert [row["step"] for row in again.rows] == list(range(1, STEPS + 1))
    for row, expected in zip(again.rows, whole.rows, strict=True):
        for name in ("loss", "grad_norm", "padding_fraction"):
            assert row[name] == pytest.approx(expected[name], rel=2e-5), (row["step"], name)
        assert (row["tokens"], row["source_tokens"]) == (expected["tokens"], expected["source_tokens"])


@pytest.mark.parametrize("step", [2, 3, 4, 6, 7])
def test_a_run_goes_on_bit_by_bit_from_any_step_of_any_phase(train_ranks, phased, whole, tmp_path, step):
    stopped = train_ranks(1, *phased, f"training.stop_after_steps={step}", dir=tmp_path / "run")
    again = train_ranks(1, *phased, dir=stopped.dir)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in whole.rows]


def test_the_first_step_of_a_phase_may_compile(train_ranks, phased, monkeypatch, tmp_path):
    """Its shapes are new: no hang is seen in the minutes that this takes."""
    heartbeat = Watchdog.heartbeat

    def recorded(self, place, timeout_s=None):
        with open(tmp_path / "places", "a") as file:
            file.write(f"{place}: {timeout_s}\n")
        heartbeat(self, place, timeout_s)

    monkeypatch.setattr(Watchdog, "heartbeat", recorded)
    train_ranks(1, *phased)
    places = (tmp_path / "places").read_text().splitlines()
    for place in ("the data of step", "micro-batch 1 of step", "the update of step"):
        patient = [line for line in places if line.startswith(place) and not line.endswith("None")]
        assert [line.split(": ")[0] for line in patient] == [f"{place} {step}" for step in (1, 4, 7)]


def test_a_checkpoint_is_of_the_model_of_its_phase(whole):
    for step, context, base in ((3, 16, 10000), (4, 32, 10000), (7, 64, 50000)):
        found = open_pretrained(whole.dir / f"checkpoints/step-{step:08d}")
        assert (found.context, found.model.config.rope_base) == (context, base)


def test_later_phases_may_change_and_earlier_ones_may_not(train_ranks, phased, capfd):
    first = train_ranks(1, *phased, "training.stop_after_steps=4")
    steps, phases = phased
    cases = {
        "until_step: 3": ("until_step: 2", "has drawn"),
        "context: 32}": ("context: 64}", "data.context 32, this is 64"),
        "context: 64}": ("context: 128}", "the longest context of each folder"),
        "until_step: 6, data: {": ("until_step: 6, model: {rope_base: 7.0}, data: {", "rope_base 10000.0, this is 7.0"),
    }
    for old, (new, said) in cases.items():
        assert old in phases
        train_ranks(1, steps, phases.replace(old, new), dir=first.dir, code=2)
        assert said in capfd.readouterr().err
    later = phases.replace("lr: 0.001, warmup_steps: 1", "lr: 0.002").replace("until_step: 6", "until_step: 5")
    again = train_ranks(1, steps, later, dir=first.dir)
    assert [row["tokens"] for row in again.rows] == [256, 512, 768, 1280, 1792, 2048, 2304, 2560]
    assert json.loads((first.dir / "starts.json").read_text())[-1]["changes"].keys() == {
        "phases[1].until_step",
        "phases[2].training.lr",
        "phases[2].training.warmup_steps",
        "training.stop_after_steps",
    }
    assert read_state(find_checkpoint(first.dir))["tokens"] == 2560
