"""Every task's answers stand in its past, and nothing else is asked."""

import numpy as np
import pytest

from lcpt.data import BatchPhase, DataError, Prefetcher, SyntheticConfig, Task, batch, batch_documents
from lcpt.data.synthetic import TASKS

CONTEXT, VOCABULARY = 96, 64


def make(task, stream="train", vocab_size=VOCABULARY, **settings):
    return Task(f"synthetic:{task}", SyntheticConfig(**settings), vocab_size, stream)


def answer_mqar(inputs, asked):
    """The token after the first place of the key that is asked for."""
    return [inputs[inputs.index(inputs[t]) + 1] for t in asked]


def answer_selective_copying(inputs, asked):
    return [token for token in inputs[: asked[0]] if token >= VOCABULARY // 2]


def answer_induction(inputs, asked):
    return answer_mqar(inputs, asked)


ORACLES = {
    "mqar": answer_mqar,
    "selective_copying": answer_selective_copying,
    "induction": answer_induction,
    "needle": answer_mqar,
}


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


def test_an_oracle_that_sees_the_past_knows_every_answer(task):
    """From the inputs up to and with the question alone; a first key asked for must have stood there before."""
    source = make(task)
    for number in range(50):
        inputs, labels = source.sample(number, 3, CONTEXT)[:2]
        assert inputs.shape == labels.shape == (CONTEXT,) and inputs.dtype == labels.dtype == np.int64
        assert inputs.min() >= 0 and inputs.max() < VOCABULARY and labels.max() < VOCABULARY
        asked = np.flatnonzero(labels >= 0)
        assert len(asked) == source.scored(CONTEXT) == (1 if task == "needle" else 6)
        if task == "selective_copying":
            answers = answer_selective_copying(inputs.tolist(), asked)
        else:
            answers = [ORACLES[task](inputs[: t + 1].tolist(), [t])[0] for t in asked]
        assert answers == labels[asked].tolist()


def test_origins_are_where_the_answers_stand(task):
    inputs, labels, origins = make(task).full_sample(5, 0, CONTEXT)
    asked = labels >= 0
    assert np.array_equal(asked, origins >= 0) and (origins[asked] < np.flatnonzero(asked)).all()
    np.testing.assert_array_equal(inputs[origins[asked]], labels[asked])


def test_nobody_knows_the_answers_without_the_past(task):
    """The commonest answer is right in about one of the tokens that can be one: no token is favoured."""
    labels = batch(make(task), 0, 0, 2000, CONTEXT)[1]
    answers = labels[labels >= 0] - VOCABULARY // 2
    assert answers.min() == 0 and answers.max() == VOCABULARY // 2 - 1
    counts, expected = np.bincount(answers), len(answers) / (VOCABULARY // 2)
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_samples_differ_by_number_seed_and_stream(task):
    train, valid = make(task), make(task, "valid")
    found = [
        source.sample(number, seed, CONTEXT)[0].tobytes()
        for source in (train, valid)
        for seed in (0, 1)
        for number in range(20)
    ]
    assert len(set(found)) == len(found)
    assert train.fingerprint == valid.fingerprint


def test_settings_change_the_fingerprint():
    sources = [make("mqar"), make("needle")]
    sources += [make("mqar", **other) for other in ({"items": 3}, {"power": 0.5}, {"vocab_size": 66})]
    assert len({source.fingerprint for source in sources}) == len(sources)


def test_a_sample_is_what_it_was_yesterday():
    """Written down: a change of the tasks or of NumPy must not change what a run was trained on."""
    inputs, labels, origins = make("mqar", vocab_size=16, items=2, power=0.5).full_sample(7, 1, 12)
    assert (inputs.tolist(), labels.tolist(), origins.tolist()) == (
        [4, 8, 0, 15, 4, 12, 6, 5, 0, 6, 13, 7],
        [-1, -1, -1, -1, 8, -1, -1, -1, 15, -1, -1, -1],
        [-1, -1, -1, -1, 1, -1, -1, -1, 3, -1, -1, -1],
    )


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_join_to_the_global_batch(task, world):
    source = make(task)
    phase = BatchPhase(first=0, source=source, context=CONTEXT, sequences=4, micro_batch=1)
    loaders = [Prefetcher([phase], 5, rank, world) for rank in range(world)]
    for step in (0, 1, 9):
        parts, whole = [loader.get(step) for loader in loaders], batch(source, 5, step, 4, CONTEXT)
        np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
        np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
        assert (whole.labels >= 0).sum() == 4 * source.scored(CONTEXT) and whole.cu_seqlens is None
    for loader in loaders:
        loader.close()


def test_documents_name_the_samples():
    assert batch_documents(make("needle"), 8, 3, 2, CONTEXT) == [
        "synthetic:needle sample 6 of seed 8",
        "synthetic:needle sample 7 of seed 8",
    ]


def test_distances_follow_the_power():
    """Even over the places with power 1; with a smaller one most questions come soon after the pairs."""

    def asked(power):
        labels = batch(make("mqar", power=power, items=4), 0, 0, 2000, CONTEXT)[1]
        return np.nonzero(labels >= 0)[1]

    even, near = asked(1.0), asked(0.01)
    assert even.min() == 8 and even.max() == CONTEXT - 2 and set(even) == set(range(8, CONTEXT, 2))
    assert np.median(even) == pytest.approx(51, abs=2) and np.median(near) < 22


@pytest.mark.parametrize(
    "task, settings, context, remark",
    [
        ("mqar", {"items": 8}, 31, "items 8 need data.context 32 or more, and it is 31"),
        ("selective_copying", {"items": 8}, 15, "items 8 need data.context 16"),
        ("induction", {"items": 8}, 16, "items 8 need data.context 17"),
        ("needle", {}, 2, "need data.context 3"),
        ("needle", {"items": 2}, 64, "has 1 at most"),
        ("mqar", {"items": 32}, 1000, "items 32 need model.vocab_size 66 or more, and it is 64"),
    ],
)
def test_what_does_not_fit_is_one_line(task, settings, context, remark):
    with pytest.raises(DataError, match=remark):
        make(task, **settings).scored(context)


def test_the_least_that_fits_is_made(task):
    items = 1 if task == "needle" else 8
    source = make(task, items=items, vocab_size=2 * items + 2)
    context = TASKS[task].min_context(items)
    for number in range(20):
        inputs, labels, origins = source.full_sample(number, 0, context)
        np.testing.assert_array_equal(inputs[origins[labels >= 0]], labels[labels >= 0])


def test_unknown_tasks_and_impossible_settings_are_named():
    with pytest.raises(DataError, match="no task 'mqra'; did you mean synthetic:mqar"):
        make("mqra")
    with pytest.raises(DataError, match="there are mqar, selective_copying, induction, needle"):
        make("")
    for name, value in (("items", 0), ("power", 0.0), ("power", 1.5), ("power", float("nan"))):
        with pytest.raises(DataError, match=f"data.synthetic.{name} is {value}"):
            SyntheticConfig(**{name: value})
