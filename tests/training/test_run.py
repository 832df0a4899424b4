"""One run of 40 steps on 2 ranks with validation: what it learns and what it leaves behind."""

import json
import math

import pytest
import torch

from lcpt.checkpoint import find_checkpoint, read_manifest, read_state
from lcpt.config import load_config
from lcpt.data import Corpus, Tokenizer, batch, open_text
from lcpt.data.order import n_windows
from lcpt.model import GPT, load_weights

KEYS = {
    "step",
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "tflops_per_second",
    "mfu",
    "peak_memory_bytes",
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "update_seconds",
    "fastest_rank_seconds",
    "slowest_rank_seconds",
    "slowest_rank",
    "data_wait_fraction",
    "save_stall_fraction",
    "source_tokens",
    "source_epochs",
    "padding_fraction",
}
VALID = {"valid_loss", "valid_bits_per_byte", "valid_tokens_scored", "valid_bytes_scored"}
LATER = ("save_stall_fraction", "peak_memory_bytes")  # which go on after the last step
STEPS = 40


@pytest.fixture(scope="module")
def run(train_ranks, valid_folder):
    return train_ranks(
        2,
        f"training.max_steps={STEPS}",
        "training.lr=0.01",
        "training.valid_every_steps=15",
        "checkpoint.every_steps=30",
        f"data.valid_path={valid_folder}",
        "training.micro_batch=4",
    )


@pytest.fixture
def trained(run):
    model = GPT(run.config.model)
    assert load_weights(model, run.dir) == run.dir / "checkpoints" / f"step-{STEPS:08d}"
    return model


def test_training_lowers_the_loss(run):
    first, last = run.rows[0], run.rows[-1]
    assert first["loss"] == pytest.approx(math.log(330), rel=0.1)
    assert last["loss"] < 0.7 * first["loss"] and last["valid_loss"] < 0.75 * first["loss"]


def test_the_run_folder_holds_these_files_alone(run):
    assert {path.name for path in run.dir.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "starts.json",
        "summary.json",
        "tensorboard",
        "checkpoints",
    }
    assert {path.name for path in (run.dir / "checkpoints").iterdir()} == {"latest", "step-00000030", "step-00000040"}
    assert (run.dir / "checkpoints/latest").read_text().strip() == "step-00000040"
    assert load_config(run.dir / "config.yaml") == run.config


def test_every_step_has_a_row_with_all_metrics(run, train_folder):
    assert [row["step"] for row in run.rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in run.rows] == [256 * (n + 1) for n in range(STEPS)]
    for row in run.rows:
        assert row.keys() == KEYS | (VALID if row["step"] in (15, 30, 40) else set())
        assert row["source_tokens"] == {str(train_folder): row["tokens"]}
        windows = n_windows(Corpus(train_folder).tokens, 32)
        assert row["source_epochs"] == {str(train_folder): 8 * row["step"] / windows}
        plain = [value for value in row.values() if not isinstance(value, dict)]
        assert all(math.isfinite(value) for value in plain if value is not None)
        none = {name for name, value in row.items() if value is None}
        assert none == ({"mfu", "update_seconds"} if row["step"] == 1 else {"mfu"})
        assert row["tokens_per_second"] == pytest.approx(256 / row["step_seconds"])
        parts = row["data_seconds"] + row["forward_seconds"] + row["backward_seconds"]
        assert 0 < parts <= row["step_seconds"] and row["peak_memory_bytes"] > 10**7
        assert row["fastest_rank_seconds"] <= row["slowest_rank_seconds"] and row["slowest_rank"] in (0, 1)
        assert 0 <= row["data_wait_fraction"] <= 1
    assert max(row["slowest_rank_seconds"] for row in run.rows) > 0
    assert run.before.keys() == {"step", "tokens"} | VALID and run.before["tokens"] == 0
    assert run.before["valid_loss"] == pytest.approx(math.log(330), rel=0.1)
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    digits = [len(str(json.loads(line)["loss"])) for line in lines[1:]]
    assert max(digits) > 12  # unrounded


def test_tensorboard_holds_the_same(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss/train")
    assert [event.step for event in losses] == list(range(1, STEPS + 1))
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in run.rows], rel=1e-6)
    assert [event.step for event in events.Scalars("loss/valid_bits_per_byte")] == [0, 15, 30, 40]
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("other/")]  # every metric has its group
    [text] = events.Tensors("config/text_summary")
    assert f"dir: {run.dir}" in text.tensor_proto.string_val[0].decode()
    plugin = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"training.lr" in plugin and b"model.attention.block_size" in plugin


def test_summary_and_environment_describe_the_run(run):
    summary = json.loads((run.dir / "summary.json").read_text())
    last = {name: value for name, value in run.rows[-1].items() if name not in LATER}
    assert last.items() <= summary.items()
    assert summary["world_size"] == 2 and summary["wall_seconds"] > 0 and summary["peak_memory_bytes"] > 10**7
    assert 0 < summary["save_stall_fraction"] < 1
    useful = sum(row["step_seconds"] for row in run.rows)
    assert summary["goodput"] == pytest.approx(useful / summary["held_seconds"]) and summary["starts"] == 1
    environment = json.loads((run.dir / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["versions"]["torch"] == torch.__version__
    assert {"command", "device", "git_commit", "cpu_count"} <= environment.keys()


def test_the_checkpoint_holds_all_that_a_restart_needs(run):
    step = find_checkpoint(run.dir)
    manifest = read_manifest(step)
    assert {"config.yaml", "tokenizer.model", "state.json", "weights-00000.safetensors"} <= manifest["files"].keys()
    assert (step / "config.yaml").read_bytes() == (run.dir / "config.yaml").read_bytes()
    corpus = Corpus(run.config.data.path)
    assert Tokenizer(step / "tokenizer.model").sha256 == corpus.manifest["tokenizer_sha256"]
    state = read_state(step)
    assert state.pop("bad_steps") == {"losses": [row["loss"] for row in run.rows], "bad": [False] * STEPS}
    assert state == {
        "step": 40,
        "tokens": 40 * 256,
        "adam_step": 40,
        "run.seed": 0,
        "data.context": 32,
        "data.mask_documents": True,
        "data.packing": "contiguous",
        "training.global_batch_tokens": 256,
        "data fingerprint": corpus.fingerprint,
        "data drawn": {
            run.config.data.path: {
                "tokens": 40 * 256,
                "epochs": 8 * 40 / n_windows(corpus.tokens, 32),
                "fingerprint": corpus.fingerprint,
                "order": "windows of 32",
                "passed": 0,
            }
        },
    }


def test_validation_loss_by_hand(run, trained, valid_folder):
    """Windows spread over the documents, on logits; each label's bytes from the tokenizer, which is exact."""
    from lcpt.training.validation import spread_windows

    corpus = Corpus(valid_folder)
    n_bytes = Tokenizer(corpus.tokenizer).token_bytes()
    nats = tokens = text = 0
    for window in spread_windows(corpus, 256, 32):
        labels = torch.from_numpy(window.labels)
        logits = trained(torch.from_numpy(window.inputs)[None])[0]
        nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += len(labels)
        text += n_bytes[window.labels].sum()
    assert run.rows[-1]["valid_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert run.rows[-1]["valid_tokens_scored"] == tokens and 256 <= tokens < 256 + 2 * 32
    assert run.rows[-1]["valid_bytes_scored"] == text
    assert run.rows[-1]["valid_bits_per_byte"] == pytest.approx(nats / text / math.log(2), rel=1e-5)


@pytest.mark.parametrize("source", ["run", "step folder"])
def test_init_from_starts_from_the_given_weights(run, trained, train_ranks, valid_folder, source):
    """Its first loss is that of the saved model, and so is the validation before it; its moments begin at zero."""
    path = run.dir if source == "run" else find_checkpoint(run.dir)
    settings = ["training.max_steps=3", "training.micro_batch=8", "run.seed=5", f"data.valid_path={valid_folder}"]
    again = train_ranks(1, f"training.init_from={path}", *settings)
    drawn = batch(open_text(run.config.data), 5, 0, 8, 32)
    inputs, labels = torch.from_numpy(drawn.inputs), torch.from_numpy(drawn.labels)
    total, count = trained(inputs, labels=labels)
    assert again.rows[0]["loss"] == pytest.approx(total.item() / count.item(), rel=1e-5)
    assert again.before["valid_loss"] == pytest.approx(run.rows[-1]["valid_loss"], rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 90, 220, 10**6])
def test_validation_windows_are_spread_evenly_over_documents(valid_folder, tokens):
    """Evenly over the documents, first and last among them, each once and within its document."""
    from lcpt.evaluation.windows import windows
    from lcpt.training.validation import spread_windows

    corpus = Corpus(valid_folder)
    everything = [w for d in range(len(corpus)) for w in windows(d, corpus.document(d)[1], 32, 32)]
    names = [(w.document, w.inputs.tolist()) for w in everything]
    picks = [names.index((w.document, w.inputs.tolist())) for w in spread_windows(corpus, tokens, 32)]
    assert len(set(picks)) == len(picks) and picks == sorted(picks)
    if tokens > 32:
        gaps = [b - a for a, b in zip(picks[:-1], picks[1:], strict=True)]
        assert (picks[0], picks[-1]) == (0, len(everything) - 1) and max(gaps) - min(gaps) <= 1
