"""Retrieval by models that look things up, all or some, by ones that know nothing, and against plain forward passes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.data import Corpus, DataError, Tokenizer
from lcpt.evaluation import retrieval
from lcpt.evaluation.retrieval import Settings, choose_texts, default_contexts, even_depths, measure, score
from lcpt.evaluation.retrieval_tasks import PASSAGE, TASKS, Reading
from lcpt.model import GPT, ModelConfig
from lcpt.model.gpt import Cache

CPU, V, CONTEXT = torch.device("cpu"), 330, 704


class LooksUp:
    """Predicts the token that followed the latest of the longest matches of the last `order` tokens, among the last
    `reach`. Without a match all tokens are as likely."""

    def __init__(self, order=64, reach=10**9):
        self.order, self.reach, self.head_weight = order, reach, torch.eye(V)
        self.config = SimpleNamespace(max_positions=None)

    def extend(self, tokens, cache=None):
        seen = tokens if cache is None else torch.cat((cache.states[0], tokens), dim=1)
        hidden = torch.zeros(*tokens.shape, V)
        count = tokens.shape[1]
        for row, all_tokens in enumerate(seen.tolist()):
            for t in range(count) if count < 24 else [count - 1]:  # of what is no answer, only the last is asked for
                said = self.predict(all_tokens[: len(all_tokens) - count + t + 1])
                if said is not None:
                    hidden[row, t, said] = 20.0
        return hidden, Cache(seen.shape[1], (seen,))

    def prefill(self, tokens, cache=None, last_only=False):
        hidden, cache = self.extend(tokens, cache)
        return hidden[:, -1:], cache

    def predict(self, seen):
        longest, said = 0, None
        for end in range(max(0, len(seen) - self.reach), len(seen) - 1):
            length = 0
            while length < min(self.order, end + 1) and seen[end - length] == seen[-1 - length]:
                length += 1
            if length >= max(1, longest):
                longest, said = length, seen[end + 1]
        return said


@pytest.fixture(scope="module")
def tokenizer(train_folder):
    return Tokenizer(train_folder / "tokenizer.model")


@pytest.fixture(scope="module")
def texts(train_folder):
    corpus = Corpus(train_folder)
    return [corpus.document(number) for number in range(len(corpus))]


@pytest.fixture
def measured(tokenizer, texts):
    """measured(model, **settings) -> the figures."""

    def call(model, texts=texts, **given):
        settings = Settings(
            **{"tasks": list(TASKS), "contexts": [CONTEXT], "depths": even_depths(3), "samples": 4, "batch": 4} | given
        )
        return measure(model, tokenizer, choose_texts(texts, settings), settings, CPU)

    return call


def by_depth(figures, task):
    return {row["depth"]: row["accuracy"] for row in figures["rows"] if row["task"] == task}


def test_one_that_looks_up_is_always_right_and_without_needles_it_guesses(measured):
    """18 answers of each task: that 8 right ones of 10 or 16 candidates are guessed has a probability of 1e-4."""
    figures = measured(LooksUp(), samples=6)
    for row in figures["rows"]:
        assert row["accuracy"] == 1.0 and row["nats"] < 1e-3 < row["nats_without"], row
    for row in figures["summary"]:
        assert row["accuracy"] == 1.0 and row["interval"] == [1.0, 1.0] and row["gain"] > 1
        if row["task"] == "copy":  # of 20 words, which it may guess
            assert row["accuracy_without"] == row["chance"] < 0.9
        else:
            assert row["accuracy_without"] < 8 / 18, row
            assert row["chance"] == (1 / 16 if row["task"] == "associative_recall" else 1 / 10)


def test_presence_is_not_enough_among_several_keys(measured):
    """One that matches three tokens finds the latest sentence, whatever its key: the one asked for at depth 1 alone."""
    figures = measured(LooksUp(order=3))
    assert set(by_depth(figures, "niah_single_2").values()) == {1.0}
    found = by_depth(figures, "niah_multikey_1")
    assert found[1.0] == 1.0 and found[0.0] == 0.0


@pytest.mark.parametrize("task", ["niah_single_2", "associative_recall"])
def test_one_that_forgets_is_right_near_the_end(measured, task):
    """It knows the last 300 tokens, of 704 or 1,000 that the context has: depths 0 … 0.6 are beyond."""
    figures = measured(LooksUp(reach=300), tasks=[task], contexts=[CONTEXT, 1000], depths=[0.0, 0.3, 0.9, 1.0])
    for row in figures["rows"]:
        if row["depth"] >= 0.9:
            assert row["accuracy"] == 1.0, row
        else:
            assert row["accuracy"] < 0.8 and row["nats"] > 1, row


KINDS = [dict(attention=AttentionConfig(kind=kind, block_size=16)) for kind in ATTENTION]
LEARNED = dict(positions="learned", max_positions=72, attention=AttentionConfig(pattern=["polysketch", "softmax"]))


@pytest.mark.parametrize("settings", [*KINDS, LEARNED], ids=[*ATTENTION, "learned positions"])
@pytest.mark.parametrize("copies", [1, 2**24])  # candidates one by one, or all at once
def test_likelihoods_are_those_of_a_forward_pass(settings, copies, monkeypatch):
    monkeypatch.setattr(retrieval, "COPIES", copies)
    model = GPT(ModelConfig(n_layers=2, d_model=16, n_heads=2, vocab_size=40, **settings)).eval().double()
    rng = np.random.default_rng(0)
    for m in (1, 3):
        readings = [
            Reading(
                tokens=rng.integers(40, size=61),
                questions=rng.integers(40, size=(2, 8)),
                candidates=rng.integers(40, size=(2, 3, m)),
                right=np.zeros(2, dtype=np.int64),
            )
            for _ in range(2)
        ]
        nats, likeliest = score(model, readings, CPU)
        for b, reading in enumerate(readings):
            for number, question in enumerate(reading.questions):
                for which, answer in enumerate(reading.candidates[number]):
                    tokens = torch.from_numpy(np.concatenate([reading.tokens, question, answer]))[None]
                    with torch.no_grad():
                        log_p = model(tokens)[0, -m - 1 : -1].log_softmax(-1)
                    expected = -log_p[range(m), answer].sum().item()
                    assert nats[b, number, which] == pytest.approx(expected, rel=1e-5)
                    assert likeliest[b, number, which] == (log_p.argmax(-1).numpy() == answer).mean()


def test_one_that_knows_nothing_guesses_and_the_batch_changes_nothing(measured):
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=V, attention=AttentionConfig(block_size=64)))
    one, other = (measured(model, tasks=["niah_single_2", "copy"], samples=3, batch=batch) for batch in (1, 4))
    for row, same in zip(one["rows"], other["rows"], strict=True):
        assert row["task"] == same["task"] and row["accuracy"] == same["accuracy"]
        for key in ("nats", "nats_without"):
            assert row[key] == pytest.approx(same[key], rel=1e-5)
        per_answer = one["answer_tokens"][row["task"]] * math.log(V)
        assert row["nats"] == pytest.approx(per_answer, rel=0.1)
    assert one["fingerprint"] == other["fingerprint"] and one["tokens_read"] == 3 * 2 * 4 * CONTEXT
    assert one["summary"][0]["accuracy"] < 0.5 and abs(one["summary"][0]["gain"]) < 0.5


def test_no_logits_of_the_whole_context_are_made(measured, largest_tensor):
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=V, attention=AttentionConfig(block_size=64)))
    with largest_tensor() as largest:
        measured(model, tasks=["niah_single_2"], samples=1, batch=1)
    assert largest.n_bytes < 4 * CONTEXT * V / 2


class KnowsOne(LooksUp):
    """Looks up in one document only."""

    def __init__(self, document):
        super().__init__()
        self.text = document.tobytes()

    def predict(self, seen):
        return super().predict(seen) if np.array(seen[1:40]).tobytes() in self.text else None


def test_the_interval_is_over_documents(measured, texts):
    """Of two documents one is all right: nothing is known of others, however many samples there are."""
    figures = measured(KnowsOne(texts[0][1]), texts=texts[:2], tasks=["niah_single_2"], depths=[0.5, 1.0], samples=8)
    (row,) = figures["summary"]
    assert figures["documents"] == 2 and 0.5 <= row["accuracy"] < 0.9 and row["interval"] == [0.0, 1.0]
    assert measured(LooksUp(), tasks=["copy"], samples=1)["summary"][0]["interval"] is None


def test_contexts_and_depths_unless_told_otherwise():
    assert default_contexts(8192) == [512, 1024, 2048, 4096, 8192]
    assert default_contexts(3000) == [512, 1024, 2048, 3000]
    assert default_contexts(512) == [256, 512] and default_contexts(1) == [1]
    assert even_depths(5) == [0, 0.25, 0.5, 0.75, 1] and even_depths(1) == [0.5] and even_depths(0) == []


def settings_for(samples, context=10):
    return Settings(tasks=["copy"], contexts=[context], depths=[0.5], samples=samples, batch=1)


def test_texts_are_drawn_evenly_from_those_that_are_long_enough():
    needed = 1 + PASSAGE + 10
    documents = [(str(n), np.full(needed - (n % 3 == 0), n), 0) for n in range(60)]  # 40 fit
    chosen = choose_texts(documents, settings_for(8))
    numbers = [text.number for text in chosen]
    assert numbers == sorted(set(numbers)) and len(numbers) == 8 and all(n % 3 for n in numbers)
    assert [int(text.tokens[0]) for text in chosen] == numbers and max(numbers) > 30
    assert [text.number for text in choose_texts(documents, settings_for(100))] == [n for n in range(60) if n % 3]


def test_what_cannot_be_measured_is_one_line(measured):
    with pytest.raises(DataError, match="a context of 5000 tokens needs one of 5033, and the longest has"):
        measured(LooksUp(), contexts=[5000])
    with pytest.raises(DataError, match=r"niah_multikey_1 needs a context of \d+ tokens, and --contexts has 256"):
        measured(LooksUp(), contexts=[256, CONTEXT])
    short = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=V, positions="learned", max_positions=500))
    with pytest.raises(DataError, match="the model has positions for 500 tokens"):
        measured(short)
    broken = LooksUp()
    broken.head_weight = torch.full((V, V), math.nan)
    with pytest.raises(DataError, match="not finite"):
        measured(broken, tasks=["copy"])
