"""launch/pretrain.sbatch under a real SLURM: controller, node daemon and munge of this test alone, on this machine."""

import contextlib
import getpass
import json
import os
import random
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lcpt.training.exit_codes import BAD_INPUT, GIVE_UP, PREEMPTED
from lcpt.training.history import CRASHES

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here; Debian's slurm-wlm and munge have them"),
]

STEPS = 24
SETTINGS = [f"training.max_steps={STEPS}", "training.global_batch_tokens=512", "checkpoint.every_steps=6"]
CRASHED = {"from_step": 0, "started": 0, "ended": 1, "end": "lightning", "world_size": 2}
TWO_RANKS = ["--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1"]
NUMBERS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "valid_loss", "valid_bits_per_byte")


class Cluster:
    """A SLURM in a folder of its own. Every process of it, down to the ranks, carries the folder in its environment."""

    def __init__(self, folder: Path):
        self._folder, self._daemons = folder, []
        folder.chmod(0o711)  # munge wants its socket to be reachable
        ports = free_ports(2)
        template = string.Template((Path(__file__).parent / "slurm.conf").read_text())
        (folder / "slurm.conf").write_text(
            template.substitute(
                folder=folder,
                user=getpass.getuser(),
                controller_port=ports[0],
                node_port=ports[1],
                first_job=random.randrange(1, 60_000),
            )
        )
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "OMP_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_"))
        }
        self._environment = {**kept, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        at = self._folder
        self._daemon(
            "munged",
            "--foreground",
            f"--socket={at}/munge.socket",
            f"--key-file={at}/munge.key",
            f"--pid-file={at}/munged.pid",
            f"--seed-file={at}/munge.seed",
            f"--log-file={at}/munged.log",
        )
        wait_for(lambda: (at / "munge.socket").exists(), 20, self.logs)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", "localhost")
        wait_for(lambda: self.run("sinfo", "--noheader", "--format=%t").stdout.strip() == "idle", 60, self.logs)

    def stop(self) -> None:
        """Kill all that began here: first the daemons, which could start more, then what they started."""
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        deadline = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert not left, f"these processes do not end: {left}"

    def run(self, *command, cwd=ROOT) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)), cwd=cwd, env=self._environment, capture_output=True, text=True, timeout=60
        )

    def processes(self, **variables) -> list[int]:
        """The pids of this cluster's processes that have these variables in their environment."""
        wanted = {f"{name}={value}".encode() for name, value in variables.items()}
        wanted.add(f"SLURM_CONF={self._folder}/slurm.conf".encode())
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found

    def _daemon(self, *command) -> None:
        with open(self._folder / f"{command[0]}.out", "wb") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )

    def logs(self) -> str:
        logs = [*self._folder.glob("*.log"), *self._folder.glob("*.out")]
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


class Job:
    """A submitted launch/pretrain.sbatch and its run folder."""

    def __init__(self, cluster: Cluster, folder: Path, flags: list[str], arguments: list):
        self.run, self._cluster, self._log = folder / "run", cluster, folder / "job.log"
        done = cluster.run(
            "sbatch",
            "--parsable",
            f"--output={self._log}",
            *flags,
            "launch/pretrain.sbatch",
            *arguments,
            f"run.dir={self.run}",
        )
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def rows(self) -> list[dict]:
        metrics = self.run / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def info(self) -> dict[str, str]:
        """Return what `scontrol show job` prints."""
        return dict(re.findall(r"(\S+?)=(\S*)", self._cluster.run("scontrol", "-o", "show", "job", self.id).stdout))

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(lambda: len(self.rows) >= count or self.info()["JobState"] not in ("PENDING", "RUNNING"), 120)
        assert len(self.rows) >= count, f"{self.info()}\n{self.log}"

    def is_queued_again(self) -> bool:
        info = self.info()
        return info["JobState"] == "PENDING" and info["Reason"] == "BeginTime"

    def let_go(self) -> None:
        """SLURM lets a requeued job wait for two minutes. Here it waits a few seconds: with none at all, its node would
        take the new start for the old one, which it was told to end."""
        self.wait_for(lambda: self.update("StartTime=now+3").returncode == 0, 30)
        self.wait_for(lambda: self.info()["JobState"] != "PENDING", 60)

    def wait_for_end(self, state: str, seconds: float = 180) -> dict[str, str]:
        self.wait_for(lambda: self.info()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
        info = self.info()
        assert info["JobState"] == state, f"{info}\n{self.log}\n{self._cluster.logs()}"
        return info

    def scancel(self, *flags) -> None:
        assert self._cluster.run("scancel", *flags, self.id).returncode == 0

    def update(self, change: str) -> subprocess.CompletedProcess:
        return self._cluster.run("scontrol", "update", f"JobId={self.id}", change)

    def ranks(self) -> list[int]:
        """The pids of the ranks' processes, in the order of ranks."""
        both = [self._cluster.processes(SLURM_JOB_ID=self.id, SLURM_STEP_ID=0, SLURM_PROCID=n) for n in range(2)]
        return sum(both, [])

    def wait_for(self, condition, seconds: float) -> None:
        wait_for(condition, seconds, lambda: f"{self.info()}\n{self.log}")


def wait_for(condition, seconds: float, explain) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing for {seconds} s\n{explain()}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def numbers(rows: list[dict]) -> list[dict]:
    """Leave out how long things took."""
    return [{name: row[name] for name in NUMBERS if name in row} for row in rows]


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # munge's socket needs a short path
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def submit(cluster, tiny_yaml, tmp_path_factory):
    """submit(*arguments, flags=(), starts=None) -> the Job of a tiny run on 2 ranks; starts: what it did before."""

    def submit(*arguments, flags=(), starts=None):
        folder = tmp_path_factory.mktemp("job")
        if starts:
            (folder / "run").mkdir()
            (folder / "run/starts.json").write_text(json.dumps(starts))
        return Job(cluster, folder, [*TWO_RANKS, *flags], [tiny_yaml, *SETTINGS, *arguments])

    return submit


@pytest.fixture(scope="module")
def uninterrupted(submit):
    """The rows of a run that nothing happened to."""
    job = submit()
    info = job.wait_for_end("COMPLETED")
    assert info["ExitCode"] == "0:0" and info["Restarts"] == "0"
    assert [row["step"] for row in job.rows] == list(range(1, STEPS + 1))
    return job.rows


def check_whole(job: Job, uninterrupted: list[dict], restarts: int = 1) -> None:
    """It came to its end after so many restarts, and nobody can tell from its numbers."""
    info = job.wait_for_end("COMPLETED")
    assert info["Restarts"] == str(restarts) and info["ExitCode"] == "0:0"
    assert numbers(job.rows) == numbers(uninterrupted)
    assert json.loads((job.run / "summary.json").read_text())["starts"] == restarts + 1
    assert not (job.run / "preempted.json").exists()


def test_goes_on_after_a_signal_and_after_a_killed_rank(submit, uninterrupted):
    """One job, as everything is slow to start: three starts of it."""
    job = submit()
    job.wait_for_steps(3)
    job.scancel("--signal=USR1")
    job.wait_for(job.is_queued_again, 120)
    marker = json.loads((job.run / "preempted.json").read_text())
    assert marker["asked_by"] == "SIGUSR1" and 3 <= marker["step"] == len(job.rows) < STEPS
    assert f"the ranks saved and left ({PREEMPTED})" in job.log

    job.let_go()
    job.wait_for_steps(marker["step"] + 5)
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.wait_for(job.is_queued_again, 120)
    assert f"a rank failed ({128 + signal.SIGKILL})" in job.log and len(job.rows) < STEPS

    job.let_go()
    check_whole(job, uninterrupted, restarts=2)
    starts = json.loads((job.run / "starts.json").read_text())
    assert starts[1]["from_step"] == marker["step"]
    assert [start["end"] for start in starts[::2]] == ["preempted", "finished"] and "rank" in starts[1]["end"]


@pytest.mark.parametrize(
    "arguments, starts, code, words",
    [
        (["training.learning_rate=1"], [], BAD_INPUT, "training.learning_rate"),  # seen before the ranks begin
        pytest.param(
            ["model.vocab_size=12"], [], BAD_INPUT, "model.vocab_size=330", marks=pytest.mark.slow
        ),  # by ranks
        ([], [CRASHED] * CRASHES, GIVE_UP, "lightning"),
    ],
    ids=["wrong key", "wrong value", "crash loop"],
)
def test_a_job_that_cannot_go_on_is_not_requeued(submit, arguments, starts, code, words):
    job = submit(*arguments, starts=starts)
    info = job.wait_for_end("FAILED")
    assert info["ExitCode"] == f"{code}:0" and info["Restarts"] == "0"
    assert [line for line in job.log.splitlines() if line.startswith("error: ") and words in line], job.log
    assert "Traceback" not in job.log and job.rows == []


def test_scancel_cancels(submit):
    job = submit()
    job.wait_for(lambda: len(job.ranks()) == 2, 60)
    job.scancel()
    assert job.wait_for_end("CANCELLED")["Restarts"] == "0"
    assert "queue" not in job.log


def test_a_job_started_outside_the_root_is_refused(cluster, tmp_path):
    done = cluster.run(
        "sbatch", "--wait", "--output=job.log", *TWO_RANKS, ROOT / "launch/pretrain.sbatch", "a.yaml", cwd=tmp_path
    )
    assert done.returncode == BAD_INPUT
    [line] = (tmp_path / "job.log").read_text().splitlines()
    assert line.startswith("error: there is no launch/pretrain.py in") and str(tmp_path) in line


@pytest.mark.slow
def test_a_run_saves_and_requeues_before_its_time_limit(submit, uninterrupted):
    """SLURM warns 60 to 90 seconds after the start. Until then the ranks are stopped; its signal wakes them."""
    job = submit(flags=["--time=2", "--signal=USR1@30"])
    job.wait_for_steps(5)
    stop(job.ranks())
    job.wait_for(job.is_queued_again, 180)
    assert json.loads((job.run / "preempted.json").read_text())["asked_by"] == "SIGUSR1"
    assert f"the ranks saved and left ({PREEMPTED})" in job.log
    job.let_go()
    check_whole(job, uninterrupted)


@pytest.mark.slow
def test_a_run_that_saves_too_slowly_before_its_time_limit_continues(submit, uninterrupted):
    """They get no warning (URG does nothing), and whenever SLURM wakes them they are stopped again."""
    job = submit(flags=["--time=1", "--signal=URG@10"])
    job.wait_for_steps(9)
    job.wait_for(lambda: stop(job.ranks()) or job.is_queued_again(), 180)
    assert "the ranks were too slow to save" in job.log
    job.let_go()
    check_whole(job, uninterrupted)


def stop(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
