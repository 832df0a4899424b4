"""Lists with commas, spaces or both; ranges and outputs that are refused before any work."""

from argparse import Namespace

import pytest

from lcpt.commands.arguments import check_output, check_ranges, whole_numbers, words


def test_lists_may_be_written_in_any_way():
    for given in (["a,b,c"], ["a", "b", "c"], ["a,", "b", ",c"], ["a, b, c"]):
        assert words(given) == ["a", "b", "c"]
    assert whole_numbers("contexts", ["8192,", "16384"]) == [8192, 16384]


@pytest.mark.parametrize("given", [["many"], ["0"], ["-1"], ["1.5"], [","], ["1_0"], ["8,x"]])
def test_what_is_no_list_of_whole_numbers_is_named(given):
    with pytest.raises(ValueError, match="--contexts"):
        whole_numbers("contexts", given)


def test_the_argument_that_is_out_of_its_range_is_named():
    check_ranges(Namespace(batch=1, head_dim=None), {"batch": 1, "head_dim": 1})
    with pytest.raises(ValueError, match="--head-dim is 0; it must be ≥ 1"):
        check_ranges(Namespace(batch=1, head_dim=0), {"batch": 1, "head_dim": 1})


def test_outputs_are_tried_before_the_work(tmp_path):
    check_output(tmp_path / "new/folder/out.json", ".md", ".png")
    assert (tmp_path / "new/folder").is_dir() and not list((tmp_path / "new/folder").iterdir())
    check_output(None)
    (tmp_path / "out.png").mkdir()
    (tmp_path / "file").write_text("")
    for output in (tmp_path, ".", tmp_path / "out.json", tmp_path / "file/out.json"):
        with pytest.raises(OSError, match="folder|File exists"):
            check_output(output, ".png")
