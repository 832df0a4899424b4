"""A rank that hangs, dies or raises ends the whole job, soon, and by name.

Every rank gives a sign of life once a second through the store at which the ranks met. A thread of rank 0 looks at all
of them and passes a verdict, which every rank obeys. Collectives alone would not do: NCCL waits for a dead rank, gloo
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
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from lcpt.parallel import groups
from lcpt.training.exit_codes import FAULT
from lcpt.training.stacks import Stacks

TICK = 1.0  # seconds between two signs of life
SILENT = 20.0  # seconds without one after which a rank counts as dead
BUSY = 120.0  # the same at the start and in the first step, where compilers and loaders may keep Python's lock for long
STARTING = 900.0  # seconds that each phase of those may take
SLOWEST = 10  # a hang is this many times longer than the longest wait so far


class Watch:
    """`beat` before every piece of work; `fail` when this rank cannot go on; `stop` when it is done.

    hang_seconds: a rank that stays in one place for longer hangs, unless it has waited a SLOWEST-th of that before;
    0 means never. record(line) is called on rank 0 when the job ends by a verdict.
    """

    def __init__(self, hang_seconds: float, record: Callable[[str], None]):
        self._hang_seconds, self._record = hang_seconds, record
        self._store = dist.PrefixStore("watch", groups.store().clone())  # a connection for this thread alone
        self._lock, self._stopped, self._left = threading.Lock(), threading.Event(), threading.Event()
        self._beats, self._place, self._since, self._patience = 0, "the start", time.monotonic(), STARTING
        self._longest = 0.0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stacks = Stacks()
        self._ticked, self._machine = time.monotonic(), this_machine()
        self._store.set(str(groups.rank()), json.dumps(self._sign_of_life()))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        threading.Thread(target=self._run_without_store, daemon=True).start()

    def beat(self, place: str, patience: float | None = None) -> None:
        """This rank begins `place`, words such as "step 7"; patience: seconds it may take, else what is usual."""
        with self._lock:
            now = time.monotonic()
            if self._patience is None:
                self._longest = max(self._longest, now - self._since)
            self._beats, self._place, self._since, self._patience = self._beats + 1, place, now, patience

    def keep_stacks_in(self, folder: Path) -> None:
        """Where stack traces go from now on; before, to stderr."""
        self._stacks = Stacks(folder)
        self._stacks.dump_unless_called_within(self._may_be_silent - 3 * TICK)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process, and with it the job. An error that comes of another rank's end waits for its name."""
        line = f"rank {groups.rank()} failed at {self._place}: {type(error).__name__}: {' '.join(str(error).split())}"
        if is_lost_connection(error) and groups.world_size() > 1:
            time.sleep(SILENT + 5 * TICK)  # within it the thread learns whose fault it is, and ends this process
        self._stopped.set()
        traceback.print_exception(error)
        with contextlib.suppress(RuntimeError):  # rank 0 and its store are gone: nobody to tell
            self._store.compare_set("verdict", "", json.dumps({"line": line, "speaker": groups.rank()}))
        self._end(line, speaks=True)

    def stop(self) -> None:
        """This rank is done and not missed any more."""
        self._stopped.set()
        self._left.set()
        self._thread.join(SILENT)
        with contextlib.suppress(RuntimeError):
            self._store.set(str(groups.rank()), "left")
        self._stacks.close()

    def _run(self) -> None:
        while not self._stopped.wait(TICK):
            self._ticked, ticked = time.monotonic(), self._ticked
            if self._ticked - ticked > 5 * TICK:  # this process or the whole machine was suspended: no hang
                self._since += self._ticked - ticked
                self._seen.clear()
            self._stacks.dump_unless_called_within(self._may_be_silent - 3 * TICK)
            try:
                self._store.set(str(groups.rank()), json.dumps(self._sign_of_life()))
                if groups.rank() == 0 and (verdict := self._judge()):
                    self._store.compare_set("verdict", "", json.dumps(verdict))
                if self._store.check(["verdict"]):
                    self._obey(**json.loads(self._store.get("verdict")))
            except RuntimeError:
                if not self._stopped.is_set():
                    self._obey("rank 0 died: it held the store at which the ranks meet", speaker=1)

    def _run_without_store(self) -> None:
        """Where rank 0 is alive but stopped, every call to its store waits for ever, whatever its timeout."""
        known, waited = self._ticked, 0
        while not self._left.wait(TICK):  # counted in ticks of its own: none pass while this process is suspended
            known, waited = self._ticked, waited + 1 if self._ticked == known else 0
            if waited * TICK > SILENT:
                self._obey("rank 0 does not answer: its process is stopped or its machine is gone", 1, stacks=True)

    @property
    def _may_be_silent(self) -> float:
        return SILENT if self._patience is None else BUSY

    def _sign_of_life(self) -> dict:
        with self._lock:
            waited = time.monotonic() - self._since
            limit = max(self._hang_seconds, SLOWEST * self._longest) if self._patience is None else self._patience
            return {
                "beats": self._beats,
                "place": self._place,
                "waited": waited,
                "pid": os.getpid(),
                "machine": self._machine,
                "hangs": bool(self._hang_seconds) and waited > limit,
                "in_collective": in_collective(),
                "may_be_silent": self._may_be_silent,
            }

    def _judge(self) -> dict | None:
        """On rank 0: which rank is dead or hangs, None if none is."""
        signs = self._signs()
        for rank, (sign, _) in signs.items():
            if sign["machine"] == self._machine and not is_alive(sign["pid"]):
                line = f"rank {rank} died: its process {sign['pid']} is gone, last seen at {sign['place']}"
                return {"line": line, "speaker": 0}
        hang = any(sign["hangs"] for sign, _ in signs.values())
        silent = [
            rank for rank, (sign, seconds) in signs.items() if seconds > (3 * TICK if hang else sign["may_be_silent"])
        ]
        if silent:
            sign, seconds = signs[silent[0]]
            line = (
                f"rank {ranks(silent)} does not answer, so its process is stopped or its machine is gone: "
                f"last seen {seconds:.0f} s ago at {sign['place']}"
            )
            return {"line": line, "speaker": 0, "stacks": True, "culprits": silent}
        if hang:
            fewest = min(sign["beats"] for sign, _ in signs.values())
            behind = [rank for rank, (sign, _) in signs.items() if sign["beats"] == fewest]
            behind = [rank for rank in behind if not signs[rank][0]["in_collective"]] or behind  # those wait for it
            sign = signs[behind[0]][0]
            line = f"rank {ranks(behind)} hangs at {sign['place']}: no progress for {sign['waited']:.0f} s"
            return {"line": line, "speaker": 0, "stacks": True, "culprits": behind}
        return None

    def _signs(self) -> dict[int, tuple[dict, float]]:
        """On rank 0: each rank's last sign of life, and how many seconds ago it came. None of those that have left."""
        now = time.monotonic()
        for rank in range(groups.world_size()):
            if self._store.check([str(rank)]):
                sign = self._store.get(str(rank))
                if self._seen.get(rank, (None, 0))[0] != sign:
                    self._seen[rank] = sign, now
        return {rank: (json.loads(sign), now - at) for rank, (sign, at) in self._seen.items() if sign != b"left"}

    def _obey(self, line: str, speaker: int, stacks: bool = False, culprits: tuple[int, ...] = ()) -> NoReturn:
        if stacks:
            self._stacks.dump()
            line += f"; stack traces of all ranks are in {self._stacks.place}"
            time.sleep(TICK)  # for the others to do the same
        for rank in culprits if speaker == groups.rank() else ():
            print(f"rank {rank} was here:\n{self._stacks.of(rank)}", file=sys.stderr)
        self._end(line, speaks=speaker == groups.rank())

    def _end(self, line: str, speaks: bool) -> NoReturn:
        if speaks:
            with contextlib.suppress(OSError):  # behind a progress bar, to a terminal that may be gone
                print(f"\nerror: {line}; start again to continue from the newest checkpoint", file=sys.stderr)
                sys.stderr.flush()
        if groups.rank() == 0:
            with contextlib.suppress(OSError):
                self._record(line)
            if groups.world_size() > 1:
                time.sleep(3 * TICK)  # it holds the store: the others must have time to read the verdict
        os._exit(FAULT)  # not sys.exit: another thread may hang for ever


def ranks(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def in_collective() -> bool:
    """Whether the main thread waits for other ranks: one that hangs by itself does not."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        if "torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def this_machine() -> str:
    """Equal for two processes that can see each other by their pids, which equal host names do not promise."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return str(uuid.uuid4())


def is_alive(pid: int) -> bool:
    """Whether that process of this machine runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_lost_connection(error: BaseException) -> bool:
    """What a collective raises when another rank is gone."""
    return isinstance(error, RuntimeError) and bool(re.search("gloo|nccl|connection|socket", str(error), re.IGNORECASE))
