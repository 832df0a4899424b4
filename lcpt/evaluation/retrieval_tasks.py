"""Plant what a model is to find again in stretches of held-out documents, and ask for it at their end.

    niah_single_2       one sentence states a value of a key; its beginning comes again
    niah_multikey_1     the same, and three such sentences with other keys and values stand elsewhere
    copy                a passage of the document; its beginning comes again
    associative_recall  16 lines of a key and its value; the beginnings of some come again

A needle is what is planted, the haystack the text around it. The first two are RULER's tasks of that name (arXiv
2404.06654) but for this: a value is a word, not a number, and it is scored by its likelihood beside other words, not
generated, so that a model that was never taught to answer can be measured. All needles but the passage are in English.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lcpt.data import AnyTokenizer, DataError
from lcpt.evaluation.retrieval_words import KEYS, VALUES

CANDIDATES = 10  # among which the right value must be the likeliest, in the tasks of RULER
NEEDLES = 4  # of niah_multikey_1, as in RULER
PAIRS = 16  # of associative_recall
PASSAGE, CUE = 32, 8  # tokens that copy plants, and those of them that it repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Holds a context that a model reads once, and the questions that may go on from it, one by one."""

    tokens: np.ndarray  # int64 [n], BOS first
    questions: np.ndarray  # int64 [Q, q]
    candidates: np.ndarray  # int64 [Q, K, m], answers
    right: np.ndarray  # int64 [Q], which of the K

    @property
    def context(self) -> int:
        """Tokens with a question and its answer."""
        return len(self.tokens) + self.questions.shape[1] + self.candidates.shape[2]


class Haystack(NamedTuple):
    """Holds a stretch of a document, without BOS; of a shorter context it is the end."""

    document: int
    passage: np.ndarray  # int64 [PASSAGE], the tokens before it
    tokens: np.ndarray  # int64 [n]
    words: Counter  # of English letters, small ones, in these


class Asked(NamedTuple):
    """Holds what is planted at a depth and what is asked about it, all int64."""

    needle: np.ndarray
    question: np.ndarray
    candidates: np.ndarray  # [K, m]
    right: int

    @property
    def answer_tokens(self) -> int:
        return self.candidates.shape[1]


class Layout(NamedTuple):
    """Holds what is planted in one context, by depth: what is asked for, and needles that are not."""

    asked: list[tuple[float, Asked]]
    others: list[tuple[float, np.ndarray]]


class Planter:
    """Draws samples of the tasks and plants them, in the tokens of one tokenizer.

    All keys have the same number of tokens, and so have all values: the likelihoods of candidates compare, and the
    contexts of a task are alike in length. Raises DataError where the tokenizer makes too few such words.
    """

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._keys, self._values = (self._of_one_length(words) for words in (KEYS, VALUES))
        # A sentence is put together from tokens, so that a value has the same ones wherever it stands.
        self._newline = self._after("", "\n")
        self._sentence = self._after("", "\nThe secret word of the"), self._after("the falcon", " is")
        self._pair = self._after("", "\nThe"), self._after("the falcon", ":")
        self._end = self._after("is copper", ".\n")
        pieces = [tokenizer.decode([token]).rstrip(" ") for token in range(tokenizer.vocab_size)]
        self._ends_sentence = np.array([piece.endswith((".", "!", "?", "\n")) for piece in pieces])

    def haystack(self, document: int, tokens: np.ndarray) -> Haystack:
        """Make one of int64 [PASSAGE + n] of a document."""
        passage, stretch = np.split(tokens, [PASSAGE])
        words = re.findall("[a-z]+", self._tokenizer.decode(stretch).lower())
        return Haystack(document, passage, stretch, Counter(words))

    def layouts(self, task: str, haystack: Haystack, depths: Sequence[float], rng: np.random.Generator) -> list[Layout]:
        """Draw a sample of a task: contexts whose questions, one after the other, are of the depths in order."""
        return TASKS[task](self, haystack, depths, rng)

    def with_needles(self, haystack: Haystack, layout: Layout, context: int) -> Reading:
        """Return a context of so many tokens, its question and answer among them."""
        needles = [(depth, asked.needle) for depth, asked in layout.asked] + layout.others
        return self._reading(haystack, needles, [asked for _, asked in layout.asked], context)

    def without_needles(self, haystack: Haystack, layouts: list[Layout], context: int) -> Reading:
        """Return one with more of the document in place of all needles, and the questions of all layouts."""
        return self._reading(haystack, [], [asked for layout in layouts for _, asked in layout.asked], context)

    def _reading(
        self, haystack: Haystack, needles: list[tuple[float, np.ndarray]], asked: list[Asked], context: int
    ) -> Reading:
        questions, candidates = np.stack([x.question for x in asked]), np.stack([x.candidates for x in asked])
        size = context - 1 - questions.shape[1] - candidates.shape[2] - sum(len(needle) for _, needle in needles)
        text = haystack.tokens[len(haystack.tokens) - size :]
        needles = sorted(needles, key=lambda x: x[0])
        parts = np.split(text, [self._place(text, depth) for depth, _ in needles])
        body = [parts[0], *(x for (_, needle), part in zip(needles, parts[1:], strict=True) for x in (needle, part))]
        return Reading(
            tokens=np.concatenate([[self._tokenizer.bos_id], *body]),
            questions=questions,
            candidates=candidates,
            right=np.array([x.right for x in asked]),
        )

    def _place(self, text: np.ndarray, depth: float) -> int:
        """Return how many tokens of the text stand before a depth: a sentence ends there, if one does nearby."""
        place, reach = round(depth * len(text)), len(text) // 32
        near = text[max(0, place - reach - 1) : place + reach]
        ends = np.flatnonzero(self._ends_sentence[near]) + 1 + max(0, place - reach - 1)
        if depth in (0, 1) or not len(ends):
            return place
        return int(ends[np.abs(ends - place).argmin()])

    def sentences(self, haystack: Haystack, needles: int, rng: np.random.Generator) -> list[Asked]:
        """Draw sentences; candidates of each are the values of all, and others that the haystack does not hold."""
        keys = _rarest(self._keys, haystack.words, needles, rng)
        candidates = np.stack(_rarest(self._values, haystack.words, CANDIDATES, rng))
        order = rng.permutation(CANDIDATES)[:needles]  # of the needles' values
        return [self._asked(self._sentence, key, candidates, right) for key, right in zip(keys, order, strict=True)]

    def pairs(self, haystack: Haystack, rng: np.random.Generator) -> list[Asked]:
        """Draw lines of key and value; candidates are all values."""
        keys = _rarest(self._keys, haystack.words, PAIRS, rng)
        values = np.stack(_rarest(self._values, haystack.words, PAIRS, rng))
        order = rng.permutation(PAIRS)
        return [self._asked(self._pair, key, values, right) for key, right in zip(keys, order, strict=True)]

    def passage(self, haystack: Haystack) -> Asked:
        needle = np.concatenate([self._newline, haystack.passage, self._newline])
        question = np.concatenate([self._newline, haystack.passage[:CUE]])
        return Asked(needle, question, haystack.passage[None, CUE:], 0)

    def _asked(self, frame: tuple[np.ndarray, np.ndarray], key: np.ndarray, values: np.ndarray, right: int) -> Asked:
        question = np.concatenate([frame[0], key, frame[1]])
        return Asked(np.concatenate([question, values[right], self._end]), question, values, right)

    def _of_one_length(self, words: list[str]) -> dict[str, np.ndarray]:
        """Return the tokens of those words that have the most frequent number of them, no two alike."""
        by_length: dict[int, dict[tuple, str]] = defaultdict(dict)
        for word in words:
            tokens = self._after("of the", f" {word}")
            by_length[len(tokens)].setdefault(tuple(tokens), word)
        found = max(by_length.values(), key=len)
        if len(found) < PAIRS:
            raise DataError(f"{self._tokenizer.path} tells too few English words apart; retrieval tasks are in English")
        return {word: np.array(tokens, dtype=np.int64) for tokens, word in found.items()}

    def _after(self, before: str, text: str) -> np.ndarray:
        known = len(self._tokenizer.encode(before))
        return np.array(self._tokenizer.encode(before + text)[known:], dtype=np.int64)


def shortest_context(layout: Layout) -> int:
    """Count the tokens of a context that is half text of the document."""
    (_, asked), *_ = layout.asked
    planted = sum(len(x.needle) for _, x in layout.asked) + sum(len(needle) for _, needle in layout.others)
    return 2 * (1 + planted + len(asked.question) + asked.answer_tokens)


def _rarest(tokens: dict[str, np.ndarray], seen: Counter, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw from the words that were not seen; where those are too few, take the least seen."""
    words = [list(tokens)[n] for n in rng.permutation(len(tokens))]
    return [tokens[word] for word in sorted(words, key=lambda word: seen[word])[:count]]


def _niah_single(
    planter: Planter, haystack: Haystack, depths: Sequence[float], rng: np.random.Generator
) -> list[Layout]:
    return [Layout([(depth, planter.sentences(haystack, 1, rng)[0])], []) for depth in depths]


def _niah_multikey(
    planter: Planter, haystack: Haystack, depths: Sequence[float], rng: np.random.Generator
) -> list[Layout]:
    layouts = []
    for depth in depths:
        asked, *others = planter.sentences(haystack, NEEDLES, rng)
        layouts.append(Layout([(depth, asked)], [(rng.uniform(), other.needle) for other in others]))
    return layouts


def _copy(planter: Planter, haystack: Haystack, depths: Sequence[float], rng: np.random.Generator) -> list[Layout]:
    return [Layout([(depth, planter.passage(haystack))], []) for depth in depths]


def _associative_recall(
    planter: Planter, haystack: Haystack, depths: Sequence[float], rng: np.random.Generator
) -> list[Layout]:
    pairs = planter.pairs(haystack, rng)
    others = [(rng.uniform(), pair.needle) for pair in pairs[len(depths) :]]
    return [Layout(list(zip(depths, pairs, strict=False)), others)]


TASKS: dict[str, Callable[[Planter, Haystack, Sequence[float], np.random.Generator], list[Layout]]] = {
    "niah_single_2": _niah_single,
    "niah_multikey_1": _niah_multikey,
    "copy": _copy,
    "associative_recall": _associative_recall,
}
CHANCE = {"niah_single_2": 1 / CANDIDATES, "niah_multikey_1": 1 / CANDIDATES, "associative_recall": 1 / PAIRS}
