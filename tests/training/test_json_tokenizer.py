"""Training on data of a tokenizer.json, with a padded vocabulary, and every tool on the checkpoint that it leaves."""

import json

import pytest

from lcpt.checkpoint import find_checkpoint
from lcpt.data import open_tokenizer
from lcpt.model.averaging import write_average
from lcpt.model.pretrained import open_pretrained
from tests.tiny_tokenizers import byte_level

PADDED = 448  # the tokenizer has fewer tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["the a small old river house walked saw under and quickly never green bird sang to of in 12 345."] * 20
    return byte_level(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", texts=words)


@pytest.fixture(scope="module")
def data(make_corpus, tokenizer):
    return make_corpus(seed=0, tokenizer=tokenizer), make_corpus(seed=1, tokenizer=tokenizer, sentences=60)


@pytest.fixture(scope="module")
def settings(data):
    return [
        *(f"data.path={data[0]}", f"data.valid_path={data[1]}", f"model.vocab_size={PADDED}"),
        *("training.max_steps=2", "checkpoint.every_steps=1", "training.valid_every_steps=1"),
        *("training.sample_every_steps=2", "training.lr=0.03", "training.warmup_steps=0"),
    ]


@pytest.fixture(scope="module")
def run(train_ranks, settings):
    return train_ranks(1, *settings)


def test_steps_keep_the_tokenizer_and_text_is_decoded(run, tokenizer, data):
    step = find_checkpoint(run.dir)
    manifest = json.loads((step / "manifest.json").read_text())
    assert (step / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert "tokenizer.json" in manifest["files"] and not (step / "tokenizer.model").exists()
    assert 3 < run.rows[-1]["valid_loss"] < 7 and run.rows[-1]["valid_bits_per_byte"] > 1
    sample = json.loads((run.dir / "samples.jsonl").read_text().splitlines()[-1])
    assert isinstance(sample["text"], str) and "<|endoftext|>" not in sample["text"]


def test_a_vocabulary_that_is_too_small_is_refused(train_ranks, settings, tokenizer, capfd):
    size = open_tokenizer(tokenizer).vocab_size
    assert size < PADDED
    train_ranks(1, *settings, f"model.vocab_size={size - 1}", code=2)
    assert f"set model.vocab_size={size}" in capfd.readouterr().err


def test_a_padded_one_is_said(train_ranks, settings, tokenizer, capfd):
    train_ranks(1, *settings, "training.stop_after_steps=1")
    said = f"note: model.vocab_size is {PADDED}, of which the data use {open_tokenizer(tokenizer).vocab_size} at most"
    assert capfd.readouterr().err.count(said) == 1


def test_a_branch_keeps_to_the_tokenizer(train_ranks, settings, run, train_folder, capfd):
    trunk = f"training.branch_from={run.dir}/checkpoints/step-00000001"
    assert len(train_ranks(1, *settings, trunk).rows) == 2
    train_ranks(1, *settings, trunk, f"data.path={train_folder}", "data.valid_path=null", code=2)
    assert "--tokenizer" in capfd.readouterr().err


@pytest.fixture
def export(run, call_program, tmp_path):
    folder = tmp_path / "export"
    assert call_program("tools/export.py", "--checkpoint", run.dir, "--output", folder)[0] == 0
    return folder


def test_an_export_has_the_tokenizer(export, run, tokenizer):
    assert sorted(path.name for path in export.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    opened = open_pretrained(export)
    assert opened.tokenizer == export / "tokenizer.json" and opened.open_tokenizer().path == opened.tokenizer
    assert open_pretrained(run.dir).open_tokenizer().sha256 == opened.open_tokenizer().sha256
    assert opened.model.config.vocab_size == PADDED
    (export / "tokenizer.json").write_text((export / "tokenizer.json").read_text() + " ")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        open_pretrained(export)


def test_a_mean_has_the_tokenizer(run, tokenizer, tmp_path):
    steps = [run.dir / "checkpoints" / name for name in ("step-00000001", "step-00000002")]
    write_average(steps, tmp_path / "mean")
    assert (tmp_path / "mean/tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_evaluation_counts_bytes_and_is_the_same_from_text(export, data, call_program, tmp_path):
    reports = []
    for source in (data[1], data[1].parent / "text.jsonl"):
        output = tmp_path / f"{source.stem}.json"
        code, *_ = call_program("tools/evaluate.py", "--checkpoint", export, "--data", source, "--output", output)
        reports.append(json.loads(output.read_text()))
        assert code == 0
    one, other = ({k: v for k, v in r.items() if k not in ("data", "tokens_per_second")} for r in reports)
    assert one["bits_per_byte"] == other["bits_per_byte"] and one["fingerprint"] == other["fingerprint"]
    texts = [json.loads(line)["text"] for line in (data[1].parent / "text.jsonl").read_text().splitlines()]
    assert one["bytes_scored"] == sum(len(text.encode()) for text in texts)


def test_generation_writes_text(export, call_program):
    """Most tokens of this model are bytes, also of characters that no text completes, or beyond the tokenizer's."""
    code, said, _ = call_program(
        *("tools/generate.py", "--checkpoint", export, "--prompt", "naïve <|endoftext|> 🐟"),
        *("--max-tokens", 60, "--temperature", 30),
    )
    assert code == 0 and said.startswith("naïve <|endoftext|> 🐟") and len(said) > 60


def test_retrieval_plants_in_its_tokens(export, data, call_program, tmp_path):
    code, _, said = call_program(
        *("tools/retrieval.py", "--checkpoint", export, "--data", data[1], "--output", tmp_path / "retrieval.json"),
        *("--contexts", "384", "--tasks", "niah_single_2,copy", "--depths", "2", "--samples", "2"),
    )
    assert code == 0, said
    assert len(json.loads((tmp_path / "retrieval.json").read_text())["rows"]) == 2 * 2


def test_the_harness_scores_with_it(export, tokenizer):
    pytest.importorskip("lm_eval", reason="pip install lcpt[eval]")
    from types import SimpleNamespace

    from lcpt.evaluation.lm_eval_model import LcptLM

    lm = LcptLM(str(export))
    requests = [SimpleNamespace(args=("the old", " house naïve 🐟"))]
    ((nats, _),) = lm.loglikelihood(requests, disable_tqdm=True)
    assert -1000 < nats < 0 and lm.tokenizer_name == open_tokenizer(tokenizer).sha256
    made = lm.generate_until([SimpleNamespace(args=("the", {"until": ["zzz"], "max_gen_toks": 5}))], disable_tqdm=True)
    assert isinstance(made[0], str)
