import subprocess
from pathlib import Path

import pytest
import torch

from lcpt.utils import provenance
from lcpt.utils.provenance import backend_of, git_commit


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dx):
        return 2 * dx


def deep(twice, x):
    return (twice(x + 1) * x).sum() + x.sum()


def test_a_kernel_anywhere_in_the_graph_is_seen(monkeypatch):
    x = torch.ones(3, requires_grad=True)
    assert backend_of(deep(Twice.apply, x)) == "torch"
    monkeypatch.setattr(Twice, "__module__", "fla.ops.simple_gla.chunk")
    assert backend_of(deep(Twice.apply, x)) == "triton"
    assert backend_of(x.square()) == "torch"


def test_an_operator_is_seen():
    twice = torch.library.custom_op(
        "lcpt_kernels::twice", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    twice.register_autograd(lambda ctx, dx: 2 * dx)
    assert backend_of(deep(twice, torch.ones(3, requires_grad=True))) == "triton"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of lcpt in the folder tmp_path/outer/copy."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "outer/copy/lcpt/utils/provenance.py"))
    (tmp_path / "outer/copy/lcpt/evaluation").mkdir(parents=True)
    return tmp_path / "outer/copy"


def commit(folder: Path) -> str:
    """A repository of it, with one commit."""
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_passed_in_where_there_is_no_repository(elsewhere, monkeypatch):
    monkeypatch.delenv("LCPT_COMMIT", raising=False)
    assert git_commit() is None
    monkeypatch.setenv("LCPT_COMMIT", "abc123")
    assert git_commit() == "abc123"
    commit(elsewhere.parent)  # one around it is none of lcpt
    assert git_commit() == "abc123"
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit() == "abc123" == provenance.report_header(torch.device("cpu"))["git_commit"]


def test_the_commit_of_the_repository_itself_counts(elsewhere, monkeypatch):
    monkeypatch.setenv("LCPT_COMMIT", "abc123")
    assert git_commit() == "abc123"
    assert commit(elsewhere) == git_commit()
