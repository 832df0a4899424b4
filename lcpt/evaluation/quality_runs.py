"""Make a run to compare: train it, then score it on texts, each a program of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train_and_evaluate(config_path: str, changes: list[str], run: Path, texts: dict[str, str]) -> bool:
    """Train into the run folder unless it is finished, then write NAME.json there for each text {NAME: path}.

    False where a program failed, which has said why.
    """
    score = [ROOT / "tools/evaluate.py", "--checkpoint", run, "--batch", "8"]
    commands = [[*score, "--data", text, "--output", run / f"{name}.json"] for name, text in texts.items()]
    if not (run / "summary.json").exists():
        commands = [[ROOT / "launch/pretrain.py", "--config", config_path, *changes], *commands]
    return all(
        subprocess.run([sys.executable, *map(str, command)], check=False).returncode == 0 for command in commands
    )
