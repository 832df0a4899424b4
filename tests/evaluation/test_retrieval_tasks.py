"""What is planted stands where it should, once, in text that holds no answer."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from lcpt.data import Corpus, DataError, Tokenizer
from lcpt.evaluation.retrieval_tasks import CANDIDATES, PAIRS, PASSAGE, TASKS, Planter, shortest_context

CONTEXTS, DEPTHS = (768, 1024), [0.0, 0.3, 0.6, 1.0]


@pytest.fixture(scope="module")
def tokenizer(train_folder):
    return Tokenizer(train_folder / "tokenizer.model")


@pytest.fixture(scope="module")
def planter(tokenizer):
    return Planter(tokenizer)


@pytest.fixture(scope="module")
def stretch(train_folder):
    return Corpus(train_folder).document(0)[1][1 : 1 + PASSAGE + max(CONTEXTS)]


@pytest.fixture
def drawn(planter, stretch):
    """drawn(task, seed=0) -> (haystack, layouts)."""

    def draw(task, seed=0):
        haystack = planter.haystack(0, stretch)
        return haystack, planter.layouts(task, haystack, DEPTHS, np.random.default_rng(seed))

    return draw


def find(part, tokens):
    """List the places where `part` begins in `tokens`."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(part))
    return np.flatnonzero((windows == part).all(1)).tolist()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_context_is_as_long_as_it_says_and_needles_stand_at_their_depths(planter, tokenizer, drawn, task, context):
    haystack, layouts = drawn(task)
    plain = planter.without_needles(haystack, layouts, context)
    assert plain.context == context and plain.tokens[0] == tokenizer.bos_id
    asked = [pair for layout in layouts for pair in layout.asked]
    assert [depth for depth, _ in asked] == DEPTHS
    assert (plain.tokens[1:] == haystack.tokens[-len(plain.tokens) + 1 :]).all()
    assert [question.tolist() for question in plain.questions] == [x.question.tolist() for _, x in asked]
    for layout in layouts:
        reading = planter.with_needles(haystack, layout, context)
        assert len(reading.tokens) + reading.questions.shape[1] + reading.candidates.shape[2] == context
        assert reading.tokens[0] == tokenizer.bos_id
        needles = [(depth, x.needle) for depth, x in layout.asked] + layout.others
        left = np.ones(len(reading.tokens), dtype=bool)
        places = {}
        for depth, needle in needles:
            (places[depth],) = find(needle, reading.tokens)
            left[places[depth] : places[depth] + len(needle)] = False
        text = reading.tokens[left][1:]
        assert (text == haystack.tokens[-len(text) :]).all()  # what is left is the end of the stretch
        for depth, place in places.items():
            before = left[1:place].sum()
            assert abs(before - depth * len(text)) <= len(text) // 32 + 1
            if depth in (0, 1):
                assert before == depth * len(text)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_stands_after_its_question_in_its_needle_alone(planter, drawn, task, seed):
    haystack, layouts = drawn(task, seed)
    for layout in layouts:
        reading = planter.with_needles(haystack, layout, CONTEXTS[0])
        for number, (_, asked) in enumerate(layout.asked):
            answer = asked.candidates[asked.right]
            whole = np.concatenate([asked.question, answer])
            assert find(whole, asked.needle) == [0]
            assert len(find(whole, reading.tokens)) == 1 and find(whole, haystack.tokens) == []
            assert (reading.candidates[number, reading.right[number]] == answer).all()


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1"])
def test_candidates_are_words_that_the_haystack_lacks(tokenizer, drawn, task):
    haystack, layouts = drawn(task)
    text = set(re.findall("[a-z]+", tokenizer.decode(haystack.tokens).lower()))
    for layout in layouts:
        words = [tokenizer.decode(x).strip() for x in layout.asked[0][1].candidates]
        assert len(set(words)) == CANDIDATES and not text & set(words)


def test_the_other_keys_have_values_among_the_candidates(tokenizer, drawn):
    _, layouts = drawn("niah_multikey_1")
    pattern = re.compile(r"\nThe secret word of the (\w+) is (\w+)\.\n")
    for layout in layouts:
        asked = layout.asked[0][1]
        facts = [
            pattern.fullmatch(tokenizer.decode(x)).groups() for x in (asked.needle, *(x for _, x in layout.others))
        ]
        keys, values = (set(x) for x in zip(*facts, strict=True))
        assert len(keys) == len(values) == 4
        assert values <= {tokenizer.decode(x).strip() for x in asked.candidates}


def test_pairs_are_asked_among_all_values(tokenizer, drawn):
    _, (layout,) = drawn("associative_recall")
    lines = [tokenizer.decode(x) for x in [*(x.needle for _, x in layout.asked), *(x for _, x in layout.others)]]
    facts = [re.fullmatch(r"\nThe (\w+): (\w+)\.\n", line).groups() for line in lines]
    assert len(dict(facts)) == PAIRS
    for _, asked in layout.asked:
        assert {tokenizer.decode(x).strip() for x in asked.candidates} == {value for _, value in facts}
    assert len({asked.right for _, asked in layout.asked}) == len(DEPTHS)


def test_what_the_haystack_holds_is_planted_last(planter, tokenizer, stretch):
    """All candidate words but nine, once, and one of them twice."""
    words = {tokenizer.decode(x).strip() for x in planter._values.values()}
    spared, often = set(sorted(words)[:9]), sorted(words)[9]
    text = " ".join(sorted(words - spared) + [often])
    haystack = planter.haystack(0, np.concatenate([stretch[:PASSAGE], tokenizer.encode(text)]))
    chosen = set()
    for seed in range(20):
        (asked,) = planter.sentences(haystack, 1, np.random.default_rng(seed))
        found = {tokenizer.decode(x).strip() for x in asked.candidates}
        assert spared < found and often not in found
        chosen |= found - spared
    assert len(chosen) > 1


def test_needles_stand_between_sentences(planter, tokenizer, drawn):
    haystack, layouts = drawn("niah_single_2")
    for depth, layout in zip(DEPTHS, layouts, strict=True):
        tokens = planter.with_needles(haystack, layout, CONTEXTS[1]).tokens
        (place,) = find(layout.asked[0][1].needle, tokens)
        if 0 < depth < 1:
            assert tokenizer.decode(tokens[:place]).endswith(".")


def test_the_same_seed_draws_the_same_and_another_something_else(planter, drawn):
    for task in set(TASKS) - {"copy"}:
        first, again, other = (
            planter.with_needles(h, x[0], 768).tokens for h, x in (drawn(task, s) for s in (0, 0, 1))
        )
        assert (first == again).all() and (first != other).any()


def test_needles_fill_at_most_half_of_the_shortest_context(planter, drawn):
    for task in TASKS:
        haystack, layouts = drawn(task)
        least = shortest_context(layouts[0])
        reading = planter.with_needles(haystack, layouts[0], least)
        needles = [x.needle for _, x in layouts[0].asked] + [x for _, x in layouts[0].others]
        text = len(reading.tokens) - 1 - sum(map(len, needles))
        assert 2 * text == least


def test_a_tokenizer_without_english_words_is_one_line(tokenizer):
    """It knows digits alone, and writes all else as one unknown piece."""
    digits = SimpleNamespace(path="digits.model", encode=lambda text: [0] * len(text.split()))
    with pytest.raises(DataError, match=r"digits\.model tells too few English words apart"):
        Planter(digits)


def test_depths_between_needles_keep_their_order(planter, drawn):
    for seed, context in itertools.product(range(5), CONTEXTS):
        haystack, layouts = drawn("niah_multikey_1", seed)
        for layout in layouts:
            tokens = planter.with_needles(haystack, layout, context).tokens
            needles = sorted([(d, x.needle) for d, x in layout.asked] + layout.others, key=lambda x: x[0])
            places = [find(needle, tokens)[0] for _, needle in needles]
            assert places == sorted(places)
