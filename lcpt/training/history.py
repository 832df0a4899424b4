"""Record a run's starts and ends over its whole life in starts.json: for goodput, and to notice a crash loop."""

from __future__ import annotations

import json
import time
from pathlib import Path

from lcpt.parallel import groups
from lcpt.training.same_run import Changes
from lcpt.training.telemetry import log_rank0
from lcpt.utils.atomic_files import replace_text

CRASHES = 3  # starts in a row from one step, each without an orderly end or a new checkpoint: then no further one

KEYS = ("started", "ended", "from_step", "world_size", "end")
ORDERLY = ("finished", "preempted", "refused")


class History:
    """Records starts with `begin` and `end`; rank 0 keeps the file.

    Each entry: started, ended (seconds since 1970), from_step, world_size, end ("finished", "preempted", or what went
    wrong; None where it died without a word), changes {key: [the checkpoint's value, the value now]} of settings.
    """

    def __init__(self, run: Path):
        self._file = run / "starts.json"
        self._starts: list[dict] = []
        self._begun = False

    def read(self) -> None:
        """Read the entries of earlier starts; call it only when no other job can be writing there."""
        if self._file.exists():
            try:
                starts = json.loads(self._file.read_text())
                self._starts = [{key: start[key] for key in KEYS} | {"changes": _changes(start)} for start in starts]
            except (ValueError, TypeError, KeyError):
                log_rank0(f"warning: {self._file} is damaged; goodput counts from this start on")

    def crash_loop_reason(self, from_step: int) -> str | None:
        """Say why there must be no further start from this step; None if there may be one."""
        crashed = []
        for start in reversed(self._starts):
            if start["from_step"] != from_step or start["end"] in ORDERLY:
                break
            crashed.append(start["end"] or "died without a word")
        if len(crashed) < CRASHES:
            return None
        return (
            f"{self._file.parent} has crashed {len(crashed)} times from step {from_step} on without a new "
            f"checkpoint, the last time: {crashed[0]}; mend that, then start again"
        )

    def refuse_crash_loop(self, from_step: int) -> str | None:
        """Record and return that reason, if there is one: whoever has read it may start again."""
        reason = self.crash_loop_reason(from_step)
        if reason:
            self._starts.append(self._entry(from_step, {}) | {"ended": time.time(), "end": "refused"})
            self._write()
        return reason

    def begin(self, from_step: int, last_seen: float | None, changes: Changes) -> None:
        """Record a start. last_seen: when the one before was last seen alive, in case it could not record its end."""
        if self._starts and self._starts[-1]["ended"] is None:
            before = self._starts[-1]
            before["ended"] = max(before["started"], last_seen or 0)
        self._starts.append(self._entry(from_step, changes))
        self._write()
        self._begun = True

    def end(self, how: str) -> None:
        """Record how this start ended, if it had begun."""
        if not self._begun:
            return
        self._starts[-1] |= {"ended": time.time(), "end": how}
        self._write()

    def goodput(self, useful_seconds: float, last_seen: float) -> dict[str, float | None]:
        """Compute the part of the time on the machines, over all starts, that went into steps that count."""
        now = time.time()
        held = sum((start["ended"] or last_seen) - start["started"] for start in self._starts)
        return {
            "goodput": useful_seconds / held if held else None,
            "held_seconds": held,
            "starts": len(self._starts),
            "wall_seconds": now - self._starts[0]["started"] if self._starts else None,
        }

    def _entry(self, from_step: int, changes: Changes) -> dict:
        return {
            "started": time.time(),
            "ended": None,
            "from_step": from_step,
            "world_size": groups.world_size(),
            "end": None,
            "changes": changes,
        }

    def _write(self) -> None:
        replace_text(self._file, json.dumps(self._starts, indent=1) + "\n")


def _changes(start: dict) -> Changes:
    return start.get("changes", {})  # starts of earlier versions recorded none
