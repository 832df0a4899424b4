import pytest

from lcpt.benchmarking.kernel_work import Work
from lcpt.benchmarking.roofline import Gpu, issue, roof, row_of, softmax_cost

GPU = Gpu(flops=100.0, bytes=10.0, launch=1.0, multiprocessors=4, clock=1000.0)


def code(*clocks):
    return dict(zip(("instructions", "tensor_clocks", "special_clocks"), clocks, strict=True))


def row(kernel="a_kernel", **settings):
    loops = [code(30, 20, 0), code(9, 0, 0), code(10, 5, 40)]
    return {"kernel": kernel, "target": "sm_90", "settings": settings, "loops": loops, "outside_loops": code(100, 7, 0)}


def test_softmax_is_counted_as_usual():
    assert softmax_cost(12, 64, 2**14, "forward")[0] == 12 * 4 * 64 * 2**28 / 2
    assert softmax_cost(12, 64, 2**14, "forward_backward")[0] == 3.5 * softmax_cost(12, 64, 2**14, "forward")[0]


def test_a_kernel_takes_the_longer_of_products_and_bytes():
    assert roof([Work("products", 1.0, 1, 50.0), Work("bytes", 30.0, 1)], 2, GPU) == 1 + 6


def test_warps_take_the_clocks_of_what_is_scarcest():
    """6 steps of the loop with 20 clocks of the tensor core, 15 of that with 5, 50 of that without."""
    work = Work("a", 0.0, 3, 0.0, (6 * 20 * 1024 * 8, 15 * 5 * 1024 * 8), (50,))
    clocks = 3 * 100 + 6 * 30 + 50 * 9 + 15 * 40
    assert issue(work, row(num_warps=8), 100, GPU) == pytest.approx(100 * clocks * 2 / 4 / 1000)
    assert issue(work, row(num_warps=8), 1, GPU) == pytest.approx(clocks * 2 / 3 / 1000)  # three programs at a time
    in_pieces = work._replace(blocks=48, steps=(50,))  # three, of which two are walked through twice
    assert issue(in_pieces, row(num_warps=8), 1, GPU) == pytest.approx(clocks * 5 / 3 * 2 / 4 / 1000)
    with pytest.raises(ValueError, match="a: 2 loops in its machine code, 1 known"):
        issue(work._replace(loops=(1.0,)), row(num_warps=4), 1, GPU)
    with pytest.raises(ValueError, match="a: 1 loops in its machine code, 0 known"):
        issue(work._replace(steps=()), row(num_warps=4), 1, GPU)


def test_rows_are_found_by_their_settings():
    report = [
        row(of="squared", head_dim=128, BM=64, num_warps=4, maxnreg=128),
        row(of="squared", head_dim=64, gated=True, BM=64),
        row(of="squared", head_dim=64, BM=64),
        row("a_kernel, backward", of="flurka", head_dim=64),
    ]
    settings = {"of": "squared", "head_dim": 64}
    assert row_of(report, "a", settings) is report[2]
    assert row_of(report, "a, backward", settings) is report[3]  # the launch of another setting
    with pytest.raises(ValueError, match="no b_kernel"):
        row_of(report, "b", settings)
