"""The recipes of docs/, executed: their code blocks change a copy of the repository, then their commands run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ("adding-a-feature-map", "adding-a-kind")
BLOCK = re.compile(r"^([^\n]*)\n\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(recipe: str) -> list[tuple[str, str, str]]:
    """The code blocks of a recipe: their language, the file that the line before them names, and their text."""
    found = []
    for before, language, text in BLOCK.findall((ROOT / f"docs/{recipe}.md").read_text()):
        named = re.search(r"`(\S+/\S+)`:$", before)
        assert language == "sh" or named, f"{recipe}: no file is named before {text!r}"
        found.append((language, named[1] if named else "", text))
    return found


def change(file: Path, language: str, text: str) -> None:
    """Append python to a file, which need not exist; insert the lines of a diff that begin with + where its other lines
    are."""
    if language == "python":
        old = file.read_text() + "\n\n" if file.exists() else ""
        file.write_text(old + text)
        return
    lines = text.splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] != "+")
    content = file.read_text()
    assert content.count(before + "\n") == 1, f"{file.name} has {before!r} not once"
    file.write_text(content.replace(before, "\n".join(line[1:] for line in lines)))


@pytest.fixture
def copy(tmp_path) -> Path:
    for folder in ("kernels", "lcpt", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(copy: Path, commands: str) -> tuple[int, str]:
    """Run shell commands in the copy -> the exit code of the first that fails, or 0, and what all of them print."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{copy}:{copy}/kernels",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(["sh", "-ec", commands], cwd=copy, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_passes_its_tests(copy, recipe):
    """In two files, as the recipe says; and its commands find tests to run."""
    pytest.importorskip("triton")
    files = set()
    for language, file, text in blocks(recipe):
        if language == "sh":
            code, output = run(copy, text)
            assert code == 0, output[-5000:]
        else:
            files.add(file)
            change(copy / file, language, text)
    assert len(files) == 2


def test_a_map_without_triton_formulas_is_noticed(copy):
    pytest.importorskip("triton")
    language, file, text = blocks("adding-a-feature-map")[0]
    change(copy / file, language, text)
    code, output = run(copy, "python -m pytest tests/kernels/test_feature_map_registry.py")
    assert code == 1 and "squared_relu" in output
