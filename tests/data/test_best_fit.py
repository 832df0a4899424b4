"""Packed samples hold every token once an epoch and short documents whole, wherever a run starts and on any ranks."""

import hashlib
import random
from types import SimpleNamespace

import numpy as np
import pytest

from lcpt.data import (
    BatchPhase,
    BestFit,
    Corpus,
    DataConfig,
    DataError,
    Drawn,
    Mixture,
    Prefetcher,
    SourceConfig,
    batch,
    open_text,
)

SEED = 5


def lengths_of(name, tokens, context):
    draw = np.random.default_rng(0)
    lengths = {
        "short": lambda: np.full(tokens // 2, 2),
        "log-normal": lambda: draw.lognormal(np.log(context / 4), 1.2, 8 * tokens // context),
        "long": lambda: draw.integers(3 * context, 40 * context, 200),
        "0.6 of a context": lambda: np.full(tokens, int(0.6 * context)),
        "uniform": lambda: draw.integers(1, 2 * context, 4 * tokens // context),
        "one": lambda: np.array([tokens]),
        "a context each": lambda: np.full(tokens, context),
    }[name]()
    lengths = np.maximum(1, lengths).astype(int)
    return lengths[: max(1, np.searchsorted(np.cumsum(lengths), tokens))]


NAMES = ["short", "log-normal", "long", "0.6 of a context", "uniform", "one", "a context each"]


def epoch_of(source, context, epoch=0):
    in_epoch = source.samples_in_epoch(context)
    return [source.sample(number, SEED, context) for number in range(epoch * in_epoch, (epoch + 1) * in_epoch)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context, tokens", [(8, 40_000), (16, 20_000), (100, 60_000), (64, 700), (512, 300)])
def test_every_token_is_in_one_sample_of_an_epoch(numbered_folder, name, context, tokens):
    """Up to 20 regions, in folders of one shard and of many. Tokens are their own places in the stream."""
    lengths = lengths_of(name, tokens, context)
    source = BestFit(Corpus(numbered_folder(lengths)))
    total, ends = source.corpus.tokens, np.cumsum(lengths)
    following = np.arange(1, total + 1)
    following[ends - 1] = -1  # a document ends
    samples = epoch_of(source, context, epoch=1 if name == "uniform" else 0)
    inputs, labels = (np.concatenate(parts) for parts in list(zip(*samples, strict=True))[:2])
    padding = sum(sample.padding for sample in samples)
    assert inputs.dtype == labels.dtype == samples[0].starts.dtype == np.int64
    assert padding == len(samples) * context - total
    assert padding <= 0.01 * len(samples) * context or len(samples) < 100 and padding < context

    real = np.concatenate([np.arange(context) < context - sample.padding for sample in samples])
    np.testing.assert_array_equal(np.sort(inputs[real]), np.arange(total))
    np.testing.assert_array_equal(labels[real], following[inputs[real]])
    assert (labels[~real] == -1).all() and (inputs[~real] == 0).all()

    for sample in samples:
        assert sample.starts[0] == 0 and (np.diff(sample.starts) > 0).all() and sample.starts[-1] < context
        assert not sample.padding or sample.starts[-1] == context - sample.padding  # nothing sees the padding
    borders = np.concatenate([sample.starts + context * number for number, sample in enumerate(samples)])
    stops = np.append(borders[1:], len(inputs))
    seen = real[borders]
    begins, sizes = inputs[borders[seen]], (stops - borders)[seen]
    np.testing.assert_array_equal(inputs[stops[seen] - 1], begins + sizes - 1)  # a segment is a part of the stream
    document = np.repeat(np.arange(len(lengths)), lengths)
    np.testing.assert_array_equal(document[begins], document[begins + sizes - 1])  # and of one document

    whole = np.isin(ends - lengths, begins[sizes == lengths[document[begins]]])
    cut = (~whole & (lengths <= context)).sum()
    assert cut <= {"0.6 of a context": 0.45, "uniform": 0.05, "log-normal": 0.01}.get(name, 0) * len(lengths)


@pytest.mark.parametrize("context", [1, 5, 8192])
def test_sequences_hold_a_region_and_little_more(context):
    """For folders of any size: a region's pieces are up to context - 1 tokens more than its part of the stream."""
    draw = random.Random(0)
    contexts = [*range(1, 2000), *(draw.randrange(1, 10**n) for n in range(4, 12) for _ in range(50))]
    for tokens in (n * context + extra for n in contexts for extra in (0, -draw.randrange(context))):
        regions, bins = BestFit(SimpleNamespace(**attributes(tokens))).shape(context)
        longest = -(-tokens // regions)
        assert bins * context >= longest + (context - 1 if regions > 1 else 0)
        assert 254 <= bins <= 514 or regions == 1
        padding = regions * bins * context - tokens
        assert padding <= regions * bins * context / 100 if regions * bins >= 100 else padding < context


def attributes(tokens):
    names = ("folder", "vocab_size", "fingerprint", "tokenizer_sha256", "attachments")
    return {"tokens": tokens, **dict.fromkeys(names)}


def test_long_documents_are_cut_elsewhere_in_the_next_epoch(numbered_folder):
    source = BestFit(Corpus(numbered_folder([70, 3, 100, 32], shard_tokens=110)))

    def pieces(epoch):
        found = set()
        for inputs, _, starts, padding in epoch_of(source, 32, epoch):
            borders = [*starts, *([32] if not padding else [])]
            found |= {(int(inputs[a]), int(b - a)) for a, b in zip(borders, borders[1:], strict=False)}
        return found

    same = {(70, 3), (173, 32)}
    even = {(0, 32), (32, 32), (64, 6), (73, 32), (105, 32), (137, 32), (169, 4)} | same
    odd = {(0, 6), (6, 32), (38, 32), (73, 4), (77, 32), (109, 32), (141, 32)} | same
    # In few sequences there is no room left, so pieces may be cut once more.
    assert len(even - pieces(0)) <= 1 and len(odd - pieces(1)) <= 1 and pieces(2) == pieces(0)


@pytest.fixture
def source(numbered_folder):
    return BestFit(Corpus(numbered_folder(lengths_of("log-normal", 40_000, 16))))


def test_a_sample_is_a_pure_function_of_its_number(source):
    """In any order of access, in a folder that is opened again, and after tokens drawn before."""
    in_epoch = source.samples_in_epoch(16)
    numbers = [*range(0, 3 * in_epoch, 41), in_epoch - 1, in_epoch]
    expected = {number: source.sample(number, SEED, 16) for number in numbers}
    random.Random(0).shuffle(numbers)
    again = BestFit(Corpus(source.folder))
    later = BestFit(Corpus(source.folder))
    later.used = 16 * 41
    for number in numbers:
        equal(again.sample(number, SEED, 16), expected[number])
        if number >= 41:
            equal(later.sample(number - 41, SEED, 16), expected[number])


def equal(sample, other):
    for one, two in zip(sample, other, strict=True):
        np.testing.assert_array_equal(one, two)


def test_epochs_and_seeds_have_their_own_order(source):
    def order(epoch, seed):
        first = epoch * source.samples_in_epoch(16)
        return [tuple(source.sample(first + n, seed, 16).inputs) for n in range(200)]

    orders = [order(0, SEED), order(1, SEED), order(2, SEED), order(0, SEED + 1)]
    for number, one in enumerate(orders):
        assert all(len(set(one) & set(other)) < 150 for other in orders[:number])


def test_the_order_never_changes_by_accident(numbered_folder):
    """A resumed run needs the samples of the program that began it: this may not change. Twenty regions."""
    source = BestFit(Corpus(numbered_folder([n * n % 37 + 1 for n in range(2200)])))
    numbers = (0, 1, 2559, 5120, 10**9)
    assert [source.sample(number, 42, 8).inputs[0] for number in numbers] == [39017, 31741, 39004, 13496, 37065]
    digest = hashlib.sha256()
    for number in range(0, 12_000, 7):
        for part in source.sample(number, 42, 8)[:3]:
            digest.update(part.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "e4ad91d8b8d8680b"


def test_documents_are_those_of_the_tokens(source):
    ends = np.cumsum(source.corpus.document_lengths())
    for number in range(60):
        inputs, _, _, padding = source.sample(number, SEED, 16)
        expected = np.unique(np.searchsorted(ends, inputs[: 16 - padding], side="right"))
        assert sorted(map(int, source.documents(number, SEED, 16))) == expected.tolist()


def test_what_is_drawn_counts_sequences(source):
    in_epoch = source.samples_in_epoch(16)
    expected = Drawn(2 * in_epoch * 16, 2.0, source.fingerprint, "sequences of 16, packed")
    assert source.drawn(2 * in_epoch, 16)[str(source.folder)] == expected
    later = BestFit(source.corpus)
    later.used = 16 * in_epoch
    assert later.drawn(in_epoch, 16) == source.drawn(2 * in_epoch, 16) and later.drawn(0, 16) == source.drawn(
        in_epoch, 16
    )


@pytest.fixture
def mixed(numbered_folder):
    """Opens a mixture of three folders anew; they differ, and are packed."""
    total = 30_000
    folders = [numbered_folder(lengths) for lengths in (np.full(total // 6, 6), [total - 9, 9], [20] * (total // 20))]
    data = DataConfig(
        path=None,
        context=16,
        sources=[SourceConfig(str(path), weight) for path, weight in zip(folders, (0.5, 0.3, 0.2), strict=True)],
        packing="best_fit",
    )

    def open_mixture():
        # Content decides a fingerprint, and these folders hold the same tokens.
        def opened(path):
            corpus = Corpus(path)
            corpus.fingerprint += path[-1]
            return corpus

        return open_text(data, opened)

    return open_mixture


@pytest.mark.parametrize("world, micro_batch", [(1, 1), (2, 2), (4, 1)])
def test_batches_do_not_depend_on_ranks_micro_batches_or_resume(mixed, world, micro_batch):
    mixture = mixed()
    assert isinstance(mixture, Mixture) and all(isinstance(part, BestFit) for part in mixture.parts)
    expected = [batch(mixture, SEED, step, 8, 16) for step in range(12)]
    phase = {"first": 0, "context": 16, "sequences": 8, "micro_batch": micro_batch}
    loaders = [Prefetcher([BatchPhase(source=mixed(), **phase)], SEED, rank, world) for rank in range(world)]
    for step in (5, 6, 7, 11, 0, 1, 9):  # as on resume
        parts = [loader.get(step) for loader in loaders]
        for name in ("inputs", "labels"):
            np.testing.assert_array_equal(
                np.concatenate([getattr(part, name) for part in parts]), getattr(expected[step], name)
            )
        begins = [
            np.unique(row) + 16 * micro_batch * n
            for n, row in enumerate(row for part in parts for row in part.cu_seqlens)
        ]
        whole = np.unique([row + 16 * n for n, row in enumerate(expected[step].cu_seqlens)])
        np.testing.assert_array_equal(np.unique(np.concatenate(begins)), whole)
        assert sum(part.padding for part in parts) == expected[step].padding
    for loader in loaders:
        loader.close()


def test_what_cannot_be_packed_is_refused():
    for make, words in [
        (lambda: DataConfig("data", packing="tight"), "packing is tight; it is contiguous or best_fit"),
        (lambda: DataConfig("data", packing="best_fit", mask_documents=False), "set data.mask_documents=true"),
        (lambda: DataConfig("synthetic:mqar", packing="best_fit"), "synthetic:mqar has none"),
    ]:
        with pytest.raises(DataError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_the_config_chooses(source):
    folder = str(source.folder)
    packed = open_text(DataConfig(folder, context=16, packing="best_fit"))
    equal(packed.sample(3, SEED, 16), source.sample(3, SEED, 16))
    assert not isinstance(open_text(DataConfig(folder, context=16)), BestFit)
