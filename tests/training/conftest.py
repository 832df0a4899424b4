"""Runs of the real loop on forked ranks."""

import importlib
import json
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session", autouse=True)
def imported():
    """Seconds each: once, before ranks are forked."""
    for module in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard"):
        importlib.import_module(module)


@pytest.fixture(scope="session")
def train_ranks(run_ranks, tiny_yaml, tmp_path_factory):
    """train_ranks(world, *overrides, dir=None, code=0, yaml=tiny_yaml) -> what the run of `world` ranks, which must end
    with that exit code, left: config, dir, rows of metrics, one a step, and what it validated before, {} if nothing."""
    from lcpt.config import load_config, to_yaml
    from lcpt.training import job

    def run(world, *overrides, dir=None, code=0, timeout=60, yaml=tiny_yaml):
        folder = dir or tmp_path_factory.mktemp("run") / "run"
        config = load_config(yaml, [f"run.dir={folder}", *overrides])
        codes = run_ranks(lambda: job.run(config, to_yaml(config)), world, timeout)
        assert codes == [code] * world
        rows = read_rows(folder) if (folder / "metrics.jsonl").exists() else []
        return SimpleNamespace(config=config, dir=folder, rows=of_steps(rows), before=at_start(rows))

    return run


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def of_steps(rows):
    return [row for row in rows if row["step"]]


def at_start(rows):
    """The row of step 0, which may stand there once, at the beginning."""
    assert all(row["step"] for row in rows[1:])
    return {} if not rows or rows[0]["step"] else rows[0]


class Job:
    """Real processes, one a rank, that train and may be killed; `text` is what all of them printed."""

    def __init__(self, world, yaml, overrides, folder, output, sabotage):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.dir, self.began, self._output = folder, time.monotonic(), output
        context = multiprocessing.get_context("fork")
        arguments = yaml, [f"run.dir={folder}", *overrides], world, port, output, sabotage
        self.processes = [context.Process(target=_rank, args=(n, *arguments)) for n in range(world)]
        for process in self.processes:
            process.start()

    def wait(self, timeout=60):
        """The exit codes, negative for signals; seconds it took are in `seconds`. None is left running."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        alive = [n for n, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        self.seconds = time.monotonic() - self.began
        assert not alive, f"ranks {alive} still ran after {timeout} s:\n{self.text}"
        return [process.exitcode for process in self.processes]

    def wait_for(self, condition, timeout=60):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline and self.processes[0].is_alive(), self.text
            time.sleep(0.01)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def text(self):
        return self._output.read_text()

    @property
    def rows(self):
        return of_steps(read_rows(self.dir))

    @property
    def before(self):
        return at_start(read_rows(self.dir))


def _rank(number, yaml, overrides, world, port, output, sabotage):
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.__stderr__ = sys.stderr
    torch.set_num_threads(1)

    from lcpt.config import load_config, to_yaml
    from lcpt.training import job

    if sabotage:
        sabotage(number)
    config = load_config(yaml, overrides)
    sys.exit(job.run(config, to_yaml(config)))


@pytest.fixture
def start_job(tiny_yaml, tmp_path):
    """start_job(world, *overrides, dir=…, sabotage=None) -> a running Job; sabotage(rank) is called first in each."""
    jobs = []

    def start(world, *overrides, dir=tmp_path / "run", sabotage=None):
        output = tmp_path / f"output-{len(jobs)}.txt"
        output.touch()
        jobs.append(Job(world, tiny_yaml, overrides, dir, output, sabotage))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.fixture
def at_place():
    """at_place(words, action, rank=None) -> a sabotage that calls action() when that rank, or every one, gets there.

    Places are those that the watch knows, such as "the update of step 3".
    """

    def sabotage(words, action, rank=None):
        def install(number):
            from lcpt.training.watchdog import Watchdog

            heartbeat = Watchdog.heartbeat

            def hit(self, place, timeout_s=None):
                heartbeat(self, place, timeout_s)
                if place.startswith(words):
                    action()

            if rank in (None, number):
                Watchdog.heartbeat = hit

        return install

    return sabotage


@pytest.fixture
def send():
    """send(name) -> an action that sends this process the signal SIG<name>."""
    return lambda name: lambda: os.kill(os.getpid(), signal.Signals[f"SIG{name}"])


@pytest.fixture(scope="session")
def record():
    """record(table, row): where TABLES=FOLDER is in the environment, the rows come to stand in FOLDER/<table>.json."""
    tables = {}
    yield lambda table, row: tables.setdefault(table, []).append(row)
    if folder := os.environ.get("TABLES"):
        from lcpt.training.run_folder import environment

        now = environment()
        for table, rows in tables.items():
            report = {
                "schema_version": 1,
                "date": date.today().isoformat(),
                "git_commit": now["git_commit"],
                "device": now["device"],
                "versions": now["versions"],
                "command": "pytest " + shlex.join(sys.argv[1:]),
                "rows": rows,
            }
            Path(folder, f"{table}.json").write_text(json.dumps(report, indent=1) + "\n")


TIMES = (
    "tokens_per_second",
    "tflops_per_second",
    "peak_memory_bytes",
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "update_seconds",
    "fastest_rank_seconds",
    "slowest_rank_seconds",
    "slowest_rank",
    "data_wait_fraction",
    "save_stall_fraction",
)


@pytest.fixture(scope="session")
def numbers():
    """numbers(rows) -> the rows without what the clock says: equal for equal runs."""
    return lambda rows: [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
