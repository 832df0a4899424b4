"""What pairs settings on their documents, and what refuses to."""

import math

import pytest

from lcpt.evaluation.compared_runs import group_by_setting, read_run
from lcpt.evaluation.setting_differences import setting_differences

DOCUMENTS = [{"id": f"d{n}", "tokens": 100 + n, "bytes": 300 + n, "nats": 400.0 + 7 * n} for n in range(10)]
EVALUATION = {"fingerprint": "f" * 64, "window": 64, "stride": 64, "carry_state": False, "loss_by_position": []}


def evaluated(documents, **changes):
    """The evaluation that documents are of."""
    loss = sum(row["nats"] for row in documents) / sum(row["tokens"] for row in documents)
    report = EVALUATION | {"loss": loss, "bits_per_byte": 1.0} | changes
    return {"evaluation": report, "documents": documents}


def harder(nats, documents=DOCUMENTS):
    """Documents that cost so much more a token."""
    return [row | {"nats": row["nats"] + nats * row["tokens"]} for row in documents]


def paired(*folders):
    return setting_differences(group_by_setting(map(read_run, folders)))


def test_every_setting_is_compared_with_the_first(make_run):
    base = [make_run(f"base-{n}", run__seed=n, **evaluated(harder(0.1 * n))) for n in range(2)]
    other = [
        make_run(f"other-{n}", run__seed=n, training__lr=1.0, **evaluated(harder(more)[::-1]))
        for n, more in ((0, 0.5), (1, 0.8), (2, 0.2))
    ]
    third = make_run("third", run__seed=9, training__lr=2.0, **evaluated(harder(-1.0)))
    first, second = paired(*base, *other, third)
    assert (first["setting"], first["minus"], first["refused"]) == ("other", "base", None)
    assert (first["documents"], first["few"], first["seeds"]) == (10, False, [0, 1])
    assert first["p"] == 2 / 2**10
    in_tokens, in_bytes = first["nats_per_token"], first["bits_per_byte"]
    assert in_tokens["mean"] == pytest.approx(0.5 - 0.05) and in_tokens["interval"] == pytest.approx([0.45, 0.45])
    assert in_tokens["seeds_mean"] == pytest.approx(0.6) and in_tokens["seeds_spread"] == pytest.approx(0.1 * 2**0.5)
    factor = sum(row["tokens"] for row in DOCUMENTS) / sum(row["bytes"] for row in DOCUMENTS) / math.log(2)
    assert in_bytes["mean"] == pytest.approx(0.45 * factor)
    assert second["setting"] == "third" and second["seeds"] == [] and second["nats_per_token"]["seeds_mean"] is None


def test_another_tokenizer_pairs_by_bytes_alone(make_run):
    others = [row | {"tokens": row["tokens"] // 2} for row in DOCUMENTS]
    runs = [
        make_run("a", **evaluated(DOCUMENTS)),
        make_run("b", training__lr=1.0, **evaluated(others, fingerprint="e" * 64)),
    ]
    [row] = paired(*runs)
    assert row["bits_per_byte"]["mean"] == 0 and row["p"] == 1 and row["nats_per_token"] is None


def test_few_documents_are_said_to_be_few(make_run):
    few = DOCUMENTS[:9]
    [row] = paired(make_run("a", **evaluated(few)), make_run("b", training__lr=1.0, **evaluated(harder(1, few))))
    assert row["few"] and row["documents"] == 9 and row["p"] == 2 / 2**9


def test_runs_of_a_seed_are_averaged_before_seeds(make_run):
    a = [
        make_run(f"a-{n}", run__seed=seed, **evaluated(harder(x)))
        for n, (seed, x) in enumerate([(0, 0), (0, 2), (1, 4)])
    ]
    [row] = paired(make_run("b", training__lr=1.0, **evaluated(DOCUMENTS)), *a)
    assert row["nats_per_token"]["mean"] == pytest.approx((1 + 4) / 2)


def test_nothing_was_evaluated(make_run):
    assert paired(make_run("a"), make_run("b", training__lr=1.0)) == []


@pytest.mark.parametrize(
    "changes, reason",
    [
        (evaluated(DOCUMENTS[1:]), "different documents: 1 of 10 in one alone, such as 'd0'"),
        (
            evaluated([row | {"bytes": row["bytes"] + 1} for row in DOCUMENTS]),
            "'d0' has 301 bytes in one, 300 in another",
        ),
        (evaluated(DOCUMENTS, window=32), "different window: 32 of b, 64 of a"),
        (evaluated(DOCUMENTS, stride=32), "different stride: 32 of b, 64 of a"),
        (evaluated(DOCUMENTS, carry_state=True), "different carry state: True of b, False of a"),
        (evaluated(DOCUMENTS, precision="bf16"), "different precision: bf16 of b, fp32 of a"),
        (evaluated(DOCUMENTS, last_window="full"), "different last window: full of b, short of a"),
        (evaluated(DOCUMENTS, fingerprint="e" * 64), "different text: eeeeeeeeeeee of b, ffffffffffff of a"),
        (evaluated(DOCUMENTS, loss=3.0), "b: evaluation.documents.jsonl and evaluation.json disagree"),
        (evaluated(DOCUMENTS) | {"documents": None}, "no run of b has both evaluation.json and"),
        ({}, "no run of b has both evaluation.json and evaluation.documents.jsonl; evaluate it"),
    ],
)
def test_what_does_not_pair_has_a_reason_and_no_number(make_run, changes, reason):
    runs = [make_run("a", **evaluated(DOCUMENTS)), make_run("b", training__lr=1.0, **changes)]
    [row] = paired(*runs)
    assert reason in row["refused"] and "\n" not in row["refused"]
    assert row.keys() == {"setting", "minus", "refused"}
