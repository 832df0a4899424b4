"""End the whole job, soon and by name, when a rank hangs, dies or raises.

Every rank writes a heartbeat once a second to the store at which the ranks met. A thread of rank 0 reads all of them
and writes an abort reason, on which every rank exits. Collectives alone would not do: NCCL waits for a dead rank, gloo
does not say which one died, and neither notices a rank that is busy with something else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from lcpt.parallel import groups
from lcpt.training.exit_codes import BAD_INPUT, FAULT
from lcpt.training.stack_traces import StackTraces
from lcpt.utils.errors import one_line

HEARTBEAT_SECONDS = 1.0  # between two heartbeats
SILENCE_LIMIT_S = 20.0  # without a heartbeat after which a rank counts as dead
# The limit at the start and in the first step, where compilers and loaders may keep Python's lock for long.
STARTUP_SILENCE_LIMIT_S = 120.0
STARTUP_TIMEOUT_S = 900.0  # that each phase of start and first step may take
STACKS_PATIENCE_S = 5.0  # that rank 0 waits for the stack traces of a rank at fault
HANG_FACTOR = 10  # a wait this many times longer than the longest one so far is a hang


class Watchdog:
    """Call `heartbeat` before every piece of work, `fail` or `refuse` when this rank cannot go on, `stop` at its end.

    hang_seconds: a rank that stays in one place for longer hangs, unless it has waited a HANG_FACTOR-th of that before;
    0 means never. record(line) is called on rank 0 when the job is aborted.
    """

    def __init__(self, hang_seconds: float, record: Callable[[str], None]):
        self._hang_seconds, self._record = hang_seconds, record
        connection = groups.store().clone()  # type: ignore[attr-defined]  # PyTorch's stubs lack it
        self._store = dist.PrefixStore("watch", connection)  # for this thread alone
        self._lock, self._stopped, self._left = threading.Lock(), threading.Event(), threading.Event()
        self._heartbeats, self._place, self._since = 0, "the start", time.monotonic()
        self._timeout_s: float | None = STARTUP_TIMEOUT_S
        self._longest = 0.0
        self.is_starting = True  # not beyond the first step yet, whose pieces have time limits of their own
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stacks = StackTraces()
        self._ticked, self._machine = time.monotonic(), this_machine()
        self._store.set(str(groups.rank()), json.dumps(self._heartbeat_message()))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        threading.Thread(target=self._run_without_store, daemon=True).start()

    def heartbeat(self, place: str, timeout_s: float | None = None) -> None:
        """Note that this rank begins `place`, such as "step 7", which may take timeout_s; None: as long as usual."""
        with self._lock:
            now = time.monotonic()
            self.is_starting &= timeout_s is not None
            if self._timeout_s is None:
                self._longest = max(self._longest, now - self._since)
            self._heartbeats, self._place, self._since, self._timeout_s = self._heartbeats + 1, place, now, timeout_s

    @property
    def place(self) -> str:
        """Where this rank is: the words of its last heartbeat."""
        return self._place

    def write_stacks_to(self, folder: Path) -> None:
        """Write stack traces to files of a folder from now on; before, they go to stderr."""
        self._stacks = StackTraces(folder)
        self._stacks.dump_unless_called_within(self._silence_limit_s - 3 * HEARTBEAT_SECONDS)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process, and with it the job. An error that comes of another rank's end waits for its name."""
        line = f"rank {groups.rank()} failed at {self._place}: {type(error).__name__}: {one_line(error)}"
        if is_lost_connection(error) and groups.world_size() > 1:
            time.sleep(
                SILENCE_LIMIT_S + 5 * HEARTBEAT_SECONDS
            )  # by then the thread knows whose fault it is, and ends this process
        self._stopped.set()
        traceback.print_exception(error)
        self._leave(line, FAULT)

    def refuse(self, line: str) -> NoReturn:
        """End this process, and with it the job, for bad input that showed on this rank alone."""
        self._stopped.set()
        self._leave(line, BAD_INPUT)

    def _leave(self, line: str, code: int) -> NoReturn:
        reason, reports = json.dumps({"line": line, "reporter": groups.rank(), "code": code}), True
        with contextlib.suppress(RuntimeError):  # rank 0 and its store are gone
            reports = (
                self._store.compare_set("abort_reason", "", reason).decode() == reason
            )  # else another rank was first
        self._exit(line, reports, code)

    def stop(self) -> None:
        """Note that this rank is done: the others do not wait for its heartbeats any more."""
        self._stopped.set()
        self._left.set()
        self._thread.join(SILENCE_LIMIT_S)
        with contextlib.suppress(RuntimeError):
            self._store.set(str(groups.rank()), "left")
        self._stacks.close()

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            self._ticked, ticked = time.monotonic(), self._ticked
            if (
                self._ticked - ticked > 5 * HEARTBEAT_SECONDS
            ):  # this process or the whole machine was suspended: no hang
                self._since += self._ticked - ticked
                self._seen.clear()
            self._stacks.dump_unless_called_within(self._silence_limit_s - 3 * HEARTBEAT_SECONDS)
            try:
                self._store.set(str(groups.rank()), json.dumps(self._heartbeat_message()))
                if groups.rank() == 0 and (reason := self._find_fault()):
                    self._store.compare_set("abort_reason", "", json.dumps(reason))
                if self._store.check(["abort_reason"]):
                    self._abort(**json.loads(self._store.get("abort_reason")))
            except RuntimeError:
                if not self._stopped.is_set():
                    self._abort("rank 0 died: it held the store at which the ranks meet", reporter=1)

    def _run_without_store(self) -> None:
        """Abort where rank 0 is alive but stopped: a call to its store then waits for ever, whatever its timeout."""
        known, waited = self._ticked, 0
        # The wait is counted in this thread's own ticks: none pass while the process is suspended.
        while not self._left.wait(HEARTBEAT_SECONDS):
            known, waited = self._ticked, waited + 1 if self._ticked == known else 0
            if waited * HEARTBEAT_SECONDS > SILENCE_LIMIT_S:
                self._abort(
                    "rank 0 does not answer: its process is stopped or its machine is gone", reporter=1, stacks=True
                )

    @property
    def _silence_limit_s(self) -> float:
        return SILENCE_LIMIT_S if self._timeout_s is None else STARTUP_SILENCE_LIMIT_S

    def _heartbeat_message(self) -> dict:
        with self._lock:
            waited = time.monotonic() - self._since
            limit = max(self._hang_seconds, HANG_FACTOR * self._longest) if self._timeout_s is None else self._timeout_s
            return {
                "heartbeats": self._heartbeats,
                "place": self._place,
                "waited": waited,
                "pid": os.getpid(),
                "machine": self._machine,
                "hangs": bool(self._hang_seconds) and waited > limit,
                "in_collective": in_collective(),
                "silence_limit_s": self._silence_limit_s,
            }

    def _find_fault(self) -> dict[str, Any] | None:
        """Find, on rank 0, a rank that is dead or hangs: the arguments of `_abort`; None if there is none."""
        latest = self._latest_heartbeats()
        for rank, (heartbeat, _) in latest.items():
            if heartbeat["machine"] == self._machine and not is_alive(heartbeat["pid"]):
                line = f"rank {rank} died: its process {heartbeat['pid']} is gone, last seen at {heartbeat['place']}"
                return {"line": line, "reporter": 0}
        hang = any(heartbeat["hangs"] for heartbeat, _ in latest.values())
        silent = [
            rank
            for rank, (heartbeat, seconds) in latest.items()
            if seconds > (3 * HEARTBEAT_SECONDS if hang else heartbeat["silence_limit_s"])
        ]
        if silent:
            heartbeat, seconds = latest[silent[0]]
            line = (
                f"rank {listed(silent)} does not answer, so its process is stopped or its machine is gone: "
                f"last seen {seconds:.0f} s ago at {heartbeat['place']}"
            )
            return {"line": line, "reporter": 0, "stacks": True, "culprits": silent}
        if hang:
            fewest = min(heartbeat["heartbeats"] for heartbeat, _ in latest.values())
            behind = [rank for rank, (heartbeat, _) in latest.items() if heartbeat["heartbeats"] == fewest]
            behind = [rank for rank in behind if not latest[rank][0]["in_collective"]] or behind  # those wait for it
            heartbeat = latest[behind[0]][0]
            line = f"rank {listed(behind)} hangs at {heartbeat['place']}: no progress for {heartbeat['waited']:.0f} s"
            return {"line": line, "reporter": 0, "stacks": True, "culprits": behind}
        return None

    def _latest_heartbeats(self) -> dict[int, tuple[dict, float]]:
        """Read, on rank 0, each rank's last heartbeat and its age in seconds; without ranks that have left."""
        now = time.monotonic()
        for rank in range(groups.world_size()):
            if self._store.check([str(rank)]):
                heartbeat = self._store.get(str(rank))
                if self._seen.get(rank, (None, 0))[0] != heartbeat:
                    self._seen[rank] = heartbeat, now
        return {rank: (json.loads(text), now - at) for rank, (text, at) in self._seen.items() if text != b"left"}

    def _abort(
        self, line: str, reporter: int, stacks: bool = False, culprits: Sequence[int] = (), code: int = FAULT
    ) -> NoReturn:
        """End this process for the reason in `line`, which rank `reporter` prints."""
        if stacks:
            self._stacks.dump()
            line += f"; stack traces of all ranks are in {self._stacks.place}"
            time.sleep(HEARTBEAT_SECONDS)  # for the others to do the same
        for rank in culprits if reporter == groups.rank() else ():
            print(f"rank {rank} was here:\n{self._stacks.of(rank, STACKS_PATIENCE_S)}", file=sys.stderr)
        self._exit(line, reports=reporter == groups.rank(), code=code)

    def _exit(self, line: str, reports: bool, code: int) -> NoReturn:
        if reports:
            hint = "; start again to continue from the newest checkpoint" if code == FAULT else ""
            with contextlib.suppress(OSError):  # behind a progress bar, to a terminal that may be gone
                print(f"\nerror: {line}{hint}", file=sys.stderr)
                sys.stderr.flush()
        if groups.rank() == 0:
            with contextlib.suppress(OSError):
                self._record(line if code == FAULT else "refused")
            if groups.world_size() > 1:
                time.sleep(3 * HEARTBEAT_SECONDS)  # it holds the store: the others must have time to read why
        os._exit(code)  # not sys.exit: another thread may hang for ever


def listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def in_collective() -> bool:
    """Check whether the main thread waits for other ranks: one that hangs by itself does not."""
    thread = threading.main_thread().ident
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame:
        if "torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def this_machine() -> str:
    """Name this machine: equal for processes that see each other by pid, which equal host names do not promise."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return str(uuid.uuid4())


def is_alive(pid: int) -> bool:
    """Check whether that process of this machine runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_lost_connection(error: BaseException) -> bool:
    """Check whether this is what a collective raises when another rank is gone."""
    return isinstance(error, RuntimeError) and bool(re.search("gloo|nccl|connection|socket", str(error), re.IGNORECASE))
