"""Runs whose sequences lie on several ranks, through DeepSpeed: loss and every gradient are those of one rank."""

import itertools
import json
import time
from dataclasses import asdict, astuple, dataclass
from functools import cache

import pytest
import torch

from lcpt.attention import ATTENTION
from lcpt.checkpoint import open_checkpoint, read_tensors
from lcpt.parallel import collectives
from lcpt.training import compilation

CONTEXT, SEQUENCES, BETA = 64, 4, 0.9
PATTERNS = {
    "states": "polysketch,flurka,kernel",
    "mixed": "fastmax,softmax,feedforward,sparse_qk",
    "keys": "polynomial,sparse_hash,lowrank,fastmax",
}
UNGATED = {"softmax", "polynomial", "lowrank", "sparse_qk", "sparse_hash"}
FIXED = (
    f"data.context={CONTEXT}",
    f"training.global_batch_tokens={CONTEXT * SEQUENCES}",
    "training.warmup_steps=0",
    "training.max_steps=1",
    "training.grad_clip=1e9",  # it would be the gradients of all that one error changes
    f"training.betas=[{BETA},0.95]",
    "model.n_layers=4",
    "model.attention.polysketch.local_blocks=2",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    pattern: str
    zero_stage: int
    sequence: int
    data_ranks: int
    masked: bool
    micro_batch: int
    checkpointing: str = "false"
    compiled: bool = False


PAIRWISE = [
    Case(pattern="states", zero_stage=0, sequence=2, data_ranks=1, masked=False, micro_batch=1, checkpointing="true"),
    Case(pattern="states", zero_stage=1, sequence=4, data_ranks=1, masked=True, micro_batch=2, checkpointing="false"),
    Case(
        pattern="states", zero_stage=2, sequence=2, data_ranks=2, masked=True, micro_batch=1, checkpointing="selective"
    ),
    Case(pattern="states", zero_stage=3, sequence=4, data_ranks=1, masked=False, micro_batch=1, checkpointing="true"),
    Case(
        pattern="mixed", zero_stage=0, sequence=4, data_ranks=1, masked=True, micro_batch=2, checkpointing="selective"
    ),
    Case(pattern="mixed", zero_stage=1, sequence=2, data_ranks=2, masked=False, micro_batch=2, checkpointing="true"),
    Case(pattern="mixed", zero_stage=2, sequence=4, data_ranks=1, masked=False, micro_batch=4, checkpointing="false"),
    Case(pattern="mixed", zero_stage=3, sequence=2, data_ranks=1, masked=True, micro_batch=1, checkpointing="true"),
    Case(pattern="keys", zero_stage=0, sequence=2, data_ranks=1, masked=True, micro_batch=4, checkpointing="true"),
    Case(
        pattern="keys", zero_stage=1, sequence=4, data_ranks=1, masked=False, micro_batch=2, checkpointing="selective"
    ),
    Case(pattern="keys", zero_stage=2, sequence=2, data_ranks=1, masked=False, micro_batch=1, checkpointing="true"),
    Case(pattern="keys", zero_stage=3, sequence=2, data_ranks=2, masked=True, micro_batch=2, checkpointing="offload"),
    Case(
        pattern="kernel,softmax",
        zero_stage=3,
        sequence=2,
        data_ranks=1,
        masked=False,
        micro_batch=1,
        checkpointing="true",
        compiled=True,
    ),
]


@pytest.fixture(scope="module")
def settings(make_corpus, train_folder):
    """settings(pattern, masked) -> overrides. Documents are short: they begin and end anywhere in a slice. Packed, they
    leave padding."""
    folder = make_corpus(seed=4, tokenizer=train_folder / "tokenizer.model", sentences=2, count=150)

    def choose(pattern, masked):
        kinds = PATTERNS.get(pattern, pattern)
        gate = "none" if set(kinds.split(",")) <= UNGATED else "data"
        attention = f"model.attention.pattern=[{kinds}]", f"model.attention.gate={gate}"
        documents = ("data.packing=best_fit",) if masked else ("data.mask_documents=false",)
        return (*FIXED, *attention, f"data.path={folder}", *documents)

    return choose


@pytest.fixture(scope="module")
def compare(train_ranks, settings):
    """compare(case): the run of a case has loss, norm and every gradient of the run of one rank, to 1e-5. Returns the
    largest error of a gradient, in parts of its norm, and whose it is."""

    @cache
    def of_one_rank(pattern, masked):
        return measured(train_ranks(1, *settings(pattern, masked)))

    def run(case):
        row, gradients = of_one_rank(case.pattern, case.masked)
        shared, found = measured(
            train_ranks(
                case.sequence * case.data_ranks,
                *settings(case.pattern, case.masked),
                f"parallel.sequence={case.sequence}",
                f"parallel.zero_stage={case.zero_stage}",
                f"training.micro_batch={case.micro_batch}",
                f"model.activation_checkpointing={case.checkpointing}",
                f"training.compile={str(case.compiled).lower()}",
                timeout=120,
            )
        )
        for name in ("loss", "grad_norm", "padding_fraction"):
            assert shared[name] == pytest.approx(row[name], rel=1e-5), name
        assert found.keys() == gradients.keys()
        errors = {name: float((found[name] - x).norm() / x.norm()) for name, x in gradients.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, worst
        return {"error": errors[worst], "tensor": worst}

    return run


def measured(run):
    """The row of the only step, and each tensor's gradient, from AdamW's first moment after it.

    A bias is one tensor with its matrix: that of a gate cancels over the tokens to a thousandth of it.
    """
    step, manifest = open_checkpoint(run.dir)
    moments = read_tensors(step, manifest, "exp_avg")
    for name in [name for name in moments if name.endswith(".bias")]:
        matrix = name.replace(".bias", ".weight")
        moments[matrix] = torch.cat((moments[matrix].flatten(), moments.pop(name).flatten()))
    return run.rows[0], {name: moment / (1 - BETA) for name, moment in moments.items()}


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: "-".join(map(str, astuple(case))))
def test_gradients_in_pairs(compare, monkeypatch, case):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # no compiler is promised here
    compare(case)


ALL = [
    Case(
        pattern=pattern,
        zero_stage=stage,
        sequence=sequence,
        data_ranks=data_ranks,
        masked=masked,
        micro_batch=2 - stage % 2,
        checkpointing="true" if masked else "false",
    )
    for pattern in (*ATTENTION, "polysketch,softmax")
    for stage, sequence, data_ranks, masked in itertools.product(range(4), (2, 4), (1, 2), (False, True))
]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, astuple(case))))
def test_gradients_of_all(compare, record, case):
    record("sequence-gradients", asdict(case) | compare(case))


def test_validation_and_a_resumed_run(train_ranks, settings, valid_folder, call_program, tmp_path):
    """A run goes on with more ranks to a sequence, and is evaluated as any other. Windows too short to be shared are
    not."""
    common = (
        *settings("states", True),
        f"data.valid_path={valid_folder}",
        "training.max_steps=4",
        "training.valid_every_steps=2",
        "training.sample_every_steps=4",
    )
    alone = train_ranks(1, *common)
    first = train_ranks(2, *common, "parallel.sequence=2", "training.stop_after_steps=2", dir=tmp_path / "run")
    then = train_ranks(4, *common, "parallel.sequence=4", "parallel.zero_stage=3", dir=tmp_path / "run")
    assert (len(first.rows), len(then.rows)) == (2, 4)
    text = "--checkpoint", then.dir, "--prompt", "the old", "--max-tokens", 8, "--temperature", 0
    code, said, _ = call_program("tools/generate.py", *text)
    assert code == 0 and said == call_program("tools/generate.py", *text[:1], alone.dir, *text[2:])[1]
    report = tmp_path / "report.json"
    scored = "--checkpoint", then.dir, "--data", valid_folder, "--output", report
    assert call_program("tools/evaluate.py", *scored, "--carry-state")[0] == 0
    assert call_program("tools/evaluate.py", *scored)[0] == 0
    assert json.loads(report.read_text())["loss"] == pytest.approx(then.rows[-1]["valid_loss"], rel=0.02)  # of a part
    for row, expected in zip([then.before, *then.rows], [alone.before, *alone.rows], strict=True):
        for name in ("loss", "valid_loss", "valid_tokens_scored"):
            if name in expected:
                assert row[name] == pytest.approx(expected[name], rel=2e-5), name


def test_a_rank_that_hangs_in_an_exchange_ends_the_job_by_name(start_job, settings):
    def hang(number):
        calls = itertools.count()
        process_group = collectives._process_group

        def stuck(name):
            if next(calls) == 200:
                time.sleep(1000)
            return process_group(name)

        if number == 1:
            collectives._process_group = stuck

    job = start_job(
        2, *settings("states", True), "parallel.sequence=2", "training.max_steps=500", "training.hang_seconds=3",
        sabotage=hang,
    )  # fmt: skip
    assert job.wait(60) == [1, 1], job.text
    [line] = [line for line in job.text.splitlines() if "error: " in line]
    assert "rank 1 hangs at micro-batch" in line
    assert "lcpt/parallel/collectives.py" in (job.dir / "stacks/rank-00001.txt").read_text()
