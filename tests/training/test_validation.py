"""What a validation scores: as many labels as asked, and the bytes of their text, as tools/evaluate.py does."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

from lcpt.data import Corpus, DataError, SyntheticConfig, Task, Tokenizer, prepare
from lcpt.data.documents import documents
from lcpt.evaluation.perplexity import DocumentRecords, report
from lcpt.evaluation.scoring import score
from lcpt.evaluation.windows import text_bytes, windows
from lcpt.model import GPT, ModelConfig
from lcpt.parallel import groups
from lcpt.training import validation
from lcpt.training.validation import Validation, choose_windows, spread_windows

CPU = torch.device("cpu")
AWKWARD = "It was a dark night — naïve 北京 café “quoted” ﬁne.\n\n  Indented   text\there.\n"


def validate(source, tokens, context, batch=1, model=None):
    measures = Validation(source, tokens, context, batch)
    model = model or (lambda x, labels, part: ((labels >= 0).sum().double(), (labels >= 0).sum()))
    watch = SimpleNamespace(heartbeat=lambda *_: None, is_starting=False)
    preemption = SimpleNamespace(requested_by=None)
    return measures, measures.run(model, CPU, watch, preemption)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """2,000 documents of about 21 tokens."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("short")
    words = "the of and night rain dark wind house door light went came said old man sea".split()
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=20))}) + "\n" for _ in range(2000)]
    (folder / "t.jsonl").write_text("".join(lines))
    prepare([folder / "t.jsonl"], folder / "data", vocab_size=300, shard_tokens=9000)
    return Corpus(folder / "data")


@pytest.fixture(scope="module")
def normalising(tmp_path_factory):
    """Text, its folder prepared with a tokenizer that normalises and knows no bytes, and that tokenizer."""
    folder = tmp_path_factory.mktemp("lossy")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["It was a dark night when the indented text was quoted here, fine and naive."] * 50),
        model_prefix=str(folder / "m"),
        vocab_size=60,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=3,
    )
    # The second is blank, the fifth unknown to it, and of the last nothing is left.
    texts = [AWKWARD * 5, "   \n ", AWKWARD, " it was", "北京", "\u200b"]
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "t.jsonl"], folder / "data", tokenizer=folder / "m.model")
    return folder / "t.jsonl", Corpus(folder / "data"), Tokenizer(folder / "m.model")


@pytest.mark.parametrize("context, asked", [(8192, 20_000), (32, 5_000), (16, 7_000), (8192, 10**9)])
def test_as_many_labels_are_scored_as_asked(short, context, asked):
    everything = short.tokens - len(short)
    measures, row = validate(short, asked, context)
    wanted = min(asked, everything)
    assert wanted <= row["valid_tokens_scored"] <= 1.05 * wanted + context and row["valid_loss"] == 1
    computed = sum(inputs.size for inputs, _, _ in measures.batches)
    assert computed < 2 * row["valid_tokens_scored"] + 2 * context  # 390 times as much when padded to 8,192
    assert len({inputs.shape for inputs, _, _ in measures.batches}) <= 4
    assert max(inputs.size for inputs, _, _ in measures.batches) <= max(context, 64)
    if asked == 10**9:
        assert row["valid_tokens_scored"] == everything and row["valid_bytes_scored"] == short.manifest["bytes"]


def test_the_windows_are_the_same_for_any_world_and_batch(short, monkeypatch):
    def labels(world, batch):
        found, shapes = [], []
        for rank in range(world):
            monkeypatch.setattr(groups, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(groups, "world_size", lambda: world)
            mine = Validation(short, 1000, 16, batch)
            shapes.append([inputs.shape for inputs, _, _ in mine.batches])
            found += [row[row >= 0].tolist() for _, labels, _ in mine.batches for row in labels]
        assert all(shape == shapes[0] for shape in shapes)  # each forward pass is a collective under ZeRO-3
        return sorted(filter(None, found)), mine.bytes

    assert labels(1, 1) == labels(3, 2) == labels(4, 8) == labels(1, 50)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("context, asked", [(7, 1), (7, 40), (7, 10**6), (50, 300), (1000, 300)])
def test_choosing_equals_spreading_over_every_window(seed, context, asked):
    """Against windows that are all formed; documents of a BOS alone have none."""
    labels = np.random.default_rng(seed).integers(0, 60, size=40)
    every = [(d, b, min(n - b, context)) for d, n in enumerate(labels) for b in range(0, n, context)]

    def spread(count):
        return [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]

    numbers, begins = choose_windows(labels, asked, context)
    chosen = spread(len(numbers))
    assert list(zip(numbers.tolist(), begins.tolist(), strict=True)) == [(d, b) for d, b, _ in chosen]
    assert len(numbers) == len(every) or sum(n for *_, n in chosen) >= asked
    assert len(numbers) == 1 or sum(n for *_, n in spread(len(numbers) - 1)) < asked


def test_choosing_among_a_hundred_million_windows_forms_few(monkeypatch):
    """1 M documents of 1 M tokens: what is made is as long as the documents, not as the windows."""
    labels, largest = np.full(10**6, 10**6), []
    linspace = np.linspace
    monkeypatch.setattr(np, "linspace", lambda *a: largest.append(a[2]) or linspace(*a))
    numbers, begins = choose_windows(labels, 2**18, 8192)
    assert 32 <= len(numbers) <= 35 and numbers[0] == 0 and numbers[-1] == 10**6 - 1 and max(largest) <= 64
    assert np.all(begins < 10**6) and np.all(begins % 8192 == 0)


def test_validation_and_evaluation_count_the_same(normalising, monkeypatch):
    """Loss, labels, bytes and bits per byte of a corpus, of its text, and of a validation, with a lossy tokenizer."""
    text, corpus, tokenizer = normalising
    monkeypatch.setattr(validation, "PIECE", 7)
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=tokenizer.vocab_size))
    _, row = validate(corpus, 10**6, 24, 3, model)
    for path in (corpus.folder, text):
        records, token_bytes, identifiers = DocumentRecords(tokenizer.vocab_size), tokenizer.token_bytes(), []
        for number, (identifier, tokens, n_bytes) in enumerate(documents(path, tokenizer)):
            identifiers.append(identifier)
            cut = windows(number, tokens, 24, 24, text_bytes([tokens[1:]], n_bytes, token_bytes))
            for window, losses in score(model, cut, 2, CPU):
                records.add(window, losses)
        found = report(records.rows(identifiers))
        assert found["tokens_scored"] == row["valid_tokens_scored"]
        assert found["bytes_scored"] == row["valid_bytes_scored"]
        assert found["bits_per_byte"] == pytest.approx(row["valid_bits_per_byte"], rel=1e-6)
        assert found["loss"] == pytest.approx(row["valid_loss"], rel=1e-6)
    scored = [text.encode() for text in (AWKWARD * 5, AWKWARD, " it was", "北京")]
    assert row["valid_bytes_scored"] == sum(map(len, scored))


def test_bytes_of_some_windows_are_those_of_the_text(short):
    tokenizer = Tokenizer(short.tokenizer)
    for window in spread_windows(short, 300, 8):
        assert window.bytes == len(tokenizer.decode(window.labels).encode())


def test_a_corpus_without_a_token_to_score_is_named(normalising, tmp_path):
    _, _, tokenizer = normalising
    (tmp_path / "t.jsonl").write_text('{"text": "\u200b"}\n')
    prepare([tmp_path / "t.jsonl"], tmp_path / "data", tokenizer=tokenizer.path)
    with pytest.raises(DataError, match="no document has a token to score"):
        Validation(Corpus(tmp_path / "data"), 100, 8, 1)


def test_a_task_has_labels_and_no_bytes():
    task = Task("synthetic:mqar", SyntheticConfig(), 256, "valid")
    _, row = validate(task, 256, 64)
    assert row == {"valid_loss": 1, "valid_tokens_scored": 4 * task.scored(64)}
