"""What stands around the code agrees with it: the workflow, pre-commit, the versions."""

import re
from pathlib import Path

import lcpt_kernels
import pytest
import yaml

import lcpt

ROOT = Path(__file__).parents[1]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINNED = {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", CONSTRAINTS, re.MULTILINE)}
PROJECT = (ROOT / "pyproject.toml").read_text()  # tomllib is younger than the oldest Python of lcpt


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]


def test_the_workflow_runs_what_is_run_here_and_nothing_else(job):
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_workflow_begins_at_the_oldest_python(job):
    oldest = re.search(r'^requires-python = ">=(.*)"', PROJECT, re.MULTILINE)[1]
    assert job["strategy"]["matrix"]["python"][0] == oldest


def test_pre_commit_has_the_ruff_of_the_constraints():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    versions = {repository["repo"].rpartition("/")[2]: repository["rev"] for repository in repositories}
    assert versions["ruff-pre-commit"] == f"v{PINNED['ruff']}"


def test_every_package_that_is_asked_for_is_pinned():
    asked = re.findall(r'"([a-z][\w-]+)>=', PROJECT)
    assert len(asked) > 15
    assert {name for name in asked if name not in PINNED} == {"setuptools", "lcpt-kernels"}


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lcpt.__version__ == lcpt_kernels.__version__


def test_the_image_is_built_from_the_constraints():
    installs = re.findall(r"^RUN (pip install .*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert installs
    assert [line for line in installs if "-c constraints.txt" not in line] == []


def test_nothing_reads_a_file_in_a_way_that_could_run_its_code():
    """As SECURITY.md says."""
    risky = re.compile(r"torch\.load|\bpickle\.\w|\bmarshal\.\w|(?<!\.)\b(?:eval|exec)\(|unsafe_load|allow_pickle=True")
    files = [file for top in ("lcpt", "kernels", "tools", "launch") for file in (ROOT / top).rglob("*.py")]
    assert len(files) > 200
    assert [str(file.relative_to(ROOT)) for file in files if risky.search(file.read_text())] == []
