import threading
import time

import pytest

from lcpt.training.stack_traces import StackTraces


@pytest.fixture
def stacks(tmp_path):
    return StackTraces(tmp_path / "stacks")


def test_a_rank_that_writes_late_is_waited_for(stacks, tmp_path):
    file = tmp_path / "stacks/rank-00001.txt"
    file.touch()

    def write():
        time.sleep(0.3)
        file.write_text("line 1\nline 2\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert stacks.of(1, patience_s=30) == "line 1\nline 2\n"
    writer.join()


def test_a_rank_that_never_writes_is_not_waited_for_long(stacks, tmp_path):
    (tmp_path / "stacks/rank-00001.txt").touch()
    assert stacks.of(1, patience_s=0.2) == "(its process could not say)"
    assert stacks.of(2, patience_s=30) == "(not written)"
    assert StackTraces().of(1, patience_s=30) == "(not written)"
