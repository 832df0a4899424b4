"""How much memory a process may have."""

import os

from lcpt.utils.memory import control_group_limits, host_memory_bytes


def test_no_more_than_the_machine_has():
    assert 2**20 < host_memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_groups_above_limit_too(tmp_path):
    """As SLURM's: a job's limit stands above the groups of its steps and tasks."""
    task = tmp_path / "slurm/job_7/step_0/task_0"
    task.mkdir(parents=True)
    (tmp_path / "slurm/job_7/memory.max").write_text("1000\n")
    (task / "memory.max").write_text("max\n")
    (tmp_path.parent / "memory.max").write_text("1\n")  # outside
    assert control_group_limits("0::/slurm/job_7/step_0/task_0\n", tmp_path) == [1000]


def test_version_1_of_control_groups(tmp_path):
    folder = tmp_path / "memory/slurm/job_7"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("500\n")
    assert control_group_limits("4:cpu,cpuacct:/a\n3:memory:/slurm/job_7\n0::/b\n", tmp_path) == [500]
