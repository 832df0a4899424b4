"""Check that wrong kernels are found, on backend "torch"; and the script itself, in Triton's interpreter."""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lcpt_kernels import squared_attention

from lcpt.benchmarking import kernel_check
from lcpt.benchmarking.kernel_cases import Case, cases, inputs, options, smaller

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = list(dict.fromkeys(map(smaller, cases())))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_right_kernel_passes(case):
    row = kernel_check.check(case, CPU, repeats=2, backend="torch")
    assert row["passed"] and row["differing_repeats"] == 0, row["errors"]
    assert row["errors"].keys() == {"o", *inputs(case, CPU)}
    assert max(row["errors"].values()) > 0  # fp32 is not the definition


def test_every_setting_of_a_model_is_among_the_cases():
    every = cases()
    assert len(set(every)) == len(every) and len({case.name for case in every}) == len(every)
    for dtype in ("bf16", "fp16", "fp32"):
        assert {case.attention for case in every if case.dtype == dtype} >= {"squared", "feature", "flurka", "sparse"}
        mine = [case for case in every if case.dtype == dtype and case.attention == "squared"]
        assert {case.head_dim for case in mine} >= {64, 128} and {case.sketch for case in mine} >= {16, 32, 64}
        for key in ("gated", "exact"):
            assert {getattr(case, key) for case in mine} == {False, True}
        assert {case.local_blocks for case in mine} == {1, 2}
    for key in ("lengths", "pieces"):
        assert {bool(getattr(case, key)) for case in every} == {False, True}
    assert any(case.key_heads < case.heads for case in every) and min(case.tokens for case in every) >= 4096
    assert all(sum(case.lengths) in (0, case.tokens) for case in every + SMALL)
    assert all(0 < cut < case.tokens for case in every + SMALL for cut in case.pieces)


def wrong_output(*args, backend, **kwargs):
    o, state = squared_attention(*args, backend=backend, **kwargs)
    return (o if backend == "reference" else o * (1 + 1e-4)), state


def wrong_gradient(a, b, v, *, backend, **kwargs):
    wrong = b if backend == "reference" else b * (1 + 1e-4) - 1e-4 * b.detach()
    return squared_attention(a, wrong, v, backend=backend, **kwargs)


def no_number(*args, backend, **kwargs):
    o, state = squared_attention(*args, backend=backend, **kwargs)
    return (o if backend == "reference" else o * torch.nan), state


def forgets_what_came_before(*args, backend, initial_state=None, **kwargs):
    return squared_attention(*args, backend=backend, **kwargs)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (wrong_output, "o"),
        (wrong_gradient, "b"),
        (no_number, "o"),
        (forgets_what_came_before, "o"),
    ],
)
def test_a_wrong_kernel_does_not_pass(monkeypatch, wrong, name):
    monkeypatch.setitem(kernel_check.FUNCTIONS, "squared", wrong)
    case = next(case for case in SMALL if case.pieces and case.exact)
    row = kernel_check.check(case, CPU, repeats=1, backend="torch")
    assert not row["passed"] and not row["errors"][name] < 1e-5


def test_memory_that_nobody_wrote_is_noticed(monkeypatch):
    def leaves_rows(a, b, v, *, backend, **kwargs):
        o, state = squared_attention(a, b, v, backend=backend, **kwargs)
        return (o if backend == "reference" else o + 0 * torch.empty_like(o)), state

    monkeypatch.setitem(kernel_check.FUNCTIONS, "squared", leaves_rows)
    assert not kernel_check.check(SMALL[0], CPU, repeats=0, backend="torch")["passed"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_bits_are_noticed(monkeypatch):
    calls = []

    def restless(*args, backend, **kwargs):
        calls.append(backend)
        o, state = squared_attention(*args, backend=backend, **kwargs)
        return (o * (1 + 2e-7) if len(calls) in (4, 5) else o), state

    monkeypatch.setitem(kernel_check.FUNCTIONS, "squared", restless)
    row = kernel_check.check(SMALL[0], CPU, repeats=4, backend="torch")
    assert row["differing_repeats"] == 2 and not row["passed"] and max(row["errors"].values()) < 1e-5


@pytest.mark.parametrize("attention", kernel_check.FUNCTIONS)
def test_heads_of_a_group_meet_their_own_keys(attention):
    case = replace(smaller(Case(attention=attention, heads=12, key_heads=4)), heads=4, key_heads=2, batch=2)
    given, how = inputs(case, CPU), options(case, CPU)
    do = torch.randn(2, case.tokens, 4, case.head_dim)
    whole = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    expected = kernel_check.results(case, whole, do.double(), how, "reference")
    found = kernel_check.definition(case, given, do, how, "reference")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_the_script_checks_kernels_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    output = tmp_path / "new/right.json"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "benchmarks/check_kernels.py",
        "--small",
        "--repeats",
        "0",
        "--processes",
        "1",
        "--only",
        "pieces=(256",
        "--output",
        output,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert {"schema_version", "date", "git_commit", "device", "versions", "command", "rows"} <= report.keys()
    (row,) = report["rows"]
    assert row["passed"] and row["settings"]["pieces"] == [9, 19] and "1 of 1 cases are right" in done.stdout


def test_what_is_not_done_in_time_is_named(call_program, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    output = tmp_path / "right.json"
    code, _, err = call_program(
        "benchmarks/check_kernels.py", "--small", "--only", "pieces=(256", "--limit", 0, "--output", output
    )
    (row,) = json.loads(output.read_text())["rows"]
    assert code == 1 and "not done within 0 seconds" in row["error"] and err == f"error: wrong: {row['case']}\n"


@pytest.fixture
def script():
    """benchmarks/check_kernels.py as a module."""
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "benchmarks/check_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Process(threading.Thread):
    """In place of a process: what is True is right, what is False raises an error, and at None it dies."""

    exitcode = -11

    def __init__(self, started):
        ours, self.theirs = multiprocessing.Pipe()
        super().__init__(daemon=True)
        started.append(ours)
        self.start()

    def run(self):
        with self.theirs:
            while True:
                try:
                    case = self.theirs.recv()
                except EOFError:
                    return
                if case is None:
                    return
                self.theirs.send({"case": case} | ({} if case else {"error": "an error"}))
                if case == "last words":
                    return

    def kill(self):
        pass


@pytest.fixture
def started(script, monkeypatch):
    """Our ends of the pipes to the processes that `checked` has started."""
    ends = []

    def start(device, repeats):
        process = Process(ends)
        return ends[-1], process

    monkeypatch.setattr(script, "started", start)
    monkeypatch.setattr(script, "failed", lambda case, error: {"case": case, "error": error})
    return ends


def test_a_process_that_dies_between_cases_takes_the_next_with_it(script, started):
    rows = script.checked(["last words", 1, 2], CPU, argparse.Namespace(limit=20, processes=1, repeats=0))
    assert next(rows) == {"case": "last words"}
    time.sleep(0.2)
    assert list(rows) == [{"case": 1, "error": "its process died, exit code -11"}, {"case": 2}]


@pytest.mark.parametrize("bad, said", [(False, "an error"), (None, "its process died, exit code -11")])
def test_another_process_goes_on_after_one_that_fails(script, started, bad, said):
    args = argparse.Namespace(limit=20, processes=1, repeats=0)
    rows = script.checked([True, bad, True, True], CPU, args)
    assert next(rows) == {"case": True} and len(started) == 1
    assert next(rows) == {"case": bad, "error": said}
    assert list(rows) == [{"case": True}] * 2 and len(started) == 2


def test_rows_are_written_as_they_come(script, monkeypatch, tmp_path):
    output, written = tmp_path / "right.json", []

    def checked(chosen, device, args):
        for case in chosen[:2]:
            yield {"case": case.name, "passed": False, "error": "an error"}
            written.append([row["case"] for row in json.loads(output.read_text())["rows"]])

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(script, "checked", checked)
    monkeypatch.setattr(sys, "argv", ["check_kernels.py", "--small", "--only", "gated", "--output", str(output)])
    assert script.main() == 1
    names = [row["case"] for row in json.loads(output.read_text())["rows"]]
    assert written == [names[:1], names[:2]] and len(names) > 2  # those that have no row are named at the end


def test_no_gpu_is_one_line(call_program, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call_program("benchmarks/check_kernels.py", "--output", tmp_path / "right.json")
    assert code == 2 and "finds no GPU here" in err and err.count("\n") == 1


def test_no_case_is_one_line(call_program, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--small", "--only", "nothing", "--output", tmp_path / "right.json"]
    assert call_program("benchmarks/check_kernels.py", *arguments) == (
        2,
        "",
        "error: no case has 'nothing' in its name\n",
    )
