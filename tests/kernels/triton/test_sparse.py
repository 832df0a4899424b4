"""sparse_attention, backend="triton", against the definition: output and every gradient."""

from functools import partial

import pytest
import torch
from lcpt_kernels import sparse_attention
from lcpt_kernels.triton.interval.build_intervals import build_intervals
from lcpt_kernels.visibility import visible_ranges
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.triton.conftest import DEVICE

T = 75  # over several small tiles of 32 queries, or of 16 keys


@pytest.fixture
def agree(agree, small_tiles):
    return partial(agree, attention=sparse_attention)


def inputs(t, *, past=0, b=1, h=1, hkv=None, d=16, dv=16, seed=0):
    torch.manual_seed(seed)
    hkv = hkv or h
    shapes = {"q": (b, t, h, d), "k": (b, past + t, hkv, d), "v": (b, past + t, hkv, dv)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def shapes(given):
    return {name: (*given[name].shape[:2], given["q"].shape[2]) for name in "qk"}


def kept(given, share=0.5):
    return {f"{name}_keep": (torch.rand(shape) < share).to(DEVICE) for name, shape in shapes(given).items()}


def hashed(given, buckets=3):
    return {f"{name}_bucket": torch.randint(buckets, shape).int().to(DEVICE) for name, shape in shapes(given).items()}


MARKS = {
    "none": lambda given: {},
    "kept": kept,
    "hashed": hashed,
    "both": lambda given: kept(given, 0.8) | hashed(given, 2),
    "queries": lambda given: {"q_keep": kept(given)["q_keep"]},
    "keys": lambda given: {"k_keep": kept(given)["k_keep"]},
    "early keys": lambda given: {"k_keep": kept(given, 2)["k_keep"] & (torch.arange(T) < 5).to(DEVICE)[:, None]},
}


@pytest.mark.parametrize(
    "marks, t, past, window",
    [
        ("none", 2, 0, 0),
        ("kept", 33, 0, 0),
        ("hashed", T, 0, 0),
        ("both", T, 37, 0),
        ("none", T, 37, 0),
        ("early keys", T, 0, 0),
        ("both", 1, 37, 1),
        ("kept", T, 0, 1),
        ("hashed", T, 37, 20),
        ("queries", 40, 0, 3),
    ],
)
def test_every_length(agree, marks, t, past, window):
    given = inputs(t, past=past)
    agree(given, **MARKS[marks](given), window=window)


@pytest.mark.parametrize(
    "marks, shape",
    [
        ("keys", {"h": 4, "hkv": 2}),
        ("both", {"h": 3, "hkv": 1}),
        ("queries", {"b": 2}),
        ("hashed", {"b": 2, "h": 2}),
        ("kept", {"d": 32, "dv": 48}),
        ("hashed", {"d": 7, "dv": 2}),
        ("both", {"d": 2, "dv": 20}),
    ],
    ids=str,
)
def test_shapes(agree, marks, shape):
    given = inputs(40, **shape)
    agree(given, **MARKS[marks](given), scale=0.4)


@pytest.mark.parametrize(
    "dtype, shape, window",
    [
        (torch.bfloat16, {"d": 64, "dv": 64}, 0),
        (torch.bfloat16, {"h": 2, "hkv": 1}, 5),
        (torch.float16, {"d": 64}, 0),
    ],
    ids=str,
)
def test_16_bits(agree, dtype, shape, window):
    given = inputs(T, **shape)
    agree(given, 5e-3, dtype=dtype, **hashed(given), window=window)


@pytest.mark.parametrize(
    "norm, dtype, tolerance",
    [
        (6.0, torch.float32, 1e-5),
        (1 / 30, torch.float32, 1e-5),
        (6.0, torch.bfloat16, 5e-3),
        (30.0, torch.float16, 2e-2),
    ],
    ids=str,
)
def test_norms(agree, norm, dtype, tolerance):
    """×30: gradients of weights, and scores, that fp16 does not hold."""
    given = {name: norm * x for name, x in inputs(T, d=32, dv=32).items()}
    agree(given, tolerance, dtype=dtype, **hashed(given))


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_any_scale(agree, scale):
    """The forward pass keeps the maximum of q·k, which is not that of the scores where the scale is negative."""
    given = inputs(40)
    agree(given, **MARKS["both"](given), scale=scale)


@pytest.mark.parametrize("window", [0, 3])
def test_dropped_rows_are_not_read(small_tiles, window):
    """A step that goes beyond the interval of every row reads a row of the interval instead."""
    given = inputs(T, h=2)
    marks = kept(given)
    results = []
    for filler in (0.0, float("nan")):
        q, k, v = (x.float().to(DEVICE) for x in given.values())
        q = q.masked_fill(~marks["q_keep"][..., None], filler).requires_grad_()
        k, v = (x.masked_fill(~marks["k_keep"][..., None], filler if window == 0 else 0.0) for x in (k, v))
        leaves = [q, k.requires_grad_(), v.requires_grad_()]
        o = sparse_attention(*leaves, **marks, window=window, backend="triton")
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("lengths, window", [([40, 1, 0, 34, 3, 0, 0], 0), ([40, 1, 0, 34, 3, 0, 0], 4)], ids=str)
def test_packed_documents(agree, lengths, window):
    """The definition takes them one at a time."""
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    given = inputs(sum(lengths), h=2)
    agree(given, **MARKS["both"](given), cu_seqlens=ends, window=window)


def test_any_strides(agree):
    """Views of one fused projection, a column stride of 2, marks heads first, and a gradient that is transposed."""
    q, k = torch.randn(2, 40, 4, 16, dtype=torch.float64).split(2, dim=2)
    given = {"q": q, "k": k, "v": torch.randn(2, 40, 2, 32, dtype=torch.float64)[..., ::2]}
    marks = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in (kept(given) | hashed(given)).items()}
    agree(given, do=torch.randn(16, 2, 40, 2, dtype=torch.float64).permute(3, 2, 1, 0), **marks)
    agree(given, do=torch.ones((), dtype=torch.float64).expand(q.shape), **marks)


@pytest.mark.parametrize(
    "names",
    [
        torch.tensor([-128, -1, 126], dtype=torch.int8),
        torch.tensor([0, 254, 255], dtype=torch.uint8),
        torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32),
        torch.tensor([-(2**63), 0, 2**63 - 1]),
    ],
    ids=str,
)
def test_any_integers_name_buckets(names):
    """Also those whose differences are no int64, which PyTorch's path refuses."""
    given = {name: x.float().to(DEVICE) for name, x in inputs(30, h=2).items()}
    marks = hashed(given)
    named = {name: names.to(DEVICE)[x.long()] for name, x in marks.items()}
    assert torch.equal(*(sparse_attention(**given, **x, backend="triton") for x in (named, marks)))


@pytest.mark.parametrize("blind", ["all queries dropped", "all keys dropped", "no bucket shared", "some"])
def test_who_sees_nothing_gives_nothing(blind):
    leaves = {name: x.float().to(DEVICE).requires_grad_() for name, x in inputs(40).items()}

    def marks(x):
        return x.to(DEVICE).expand(1, 40, 1)

    options = {
        "all queries dropped": {"q_keep": marks(torch.tensor(False))},
        "all keys dropped": {"k_keep": marks(torch.tensor(False))},
        "no bucket shared": {"q_bucket": marks(torch.tensor(0)), "k_bucket": marks(torch.tensor(1))},
        "some": {"k_keep": marks((torch.arange(40) >= 3)[:, None])},
    }[blind]
    o = sparse_attention(**leaves, **options, backend="triton")
    o.sum().backward()
    silent = slice(0, 3 if blind == "some" else 40)
    for x in (o, leaves["q"].grad, leaves["k"].grad, leaves["v"].grad):
        assert torch.equal(x[:, silent], torch.zeros_like(x[:, silent])) and x.isfinite().all()
    assert blind != "some" or (o[:, 3:].abs().amax(-1) > 0).all()


def test_deterministic():
    given = inputs(40, h=2, hkv=1)
    marks = hashed(given)

    def run():
        leaves = {name: x.float().to(DEVICE).requires_grad_() for name, x in given.items()}
        o = sparse_attention(**leaves, **marks, window=2, backend="triton")
        o.square().sum().backward()
        return [o.detach(), *(x.grad for x in leaves.values())]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("marks", [name for name in MARKS if name != "early keys"])
@pytest.mark.parametrize("past", [0, 5])
def test_intervals_are_the_mask(marks, past, window):
    """From both sides, of many heads: who sees whom, every query and key once, and neither end falls."""
    t, given = 20, inputs(20, past=past, b=3, h=4)
    made = dict.fromkeys(("q_keep", "k_keep", "q_bucket", "k_bucket")) | MARKS[marks](given)
    q, k = given["q"], given["k"]
    shown = torch.zeros(12, t, past + t, dtype=torch.int32)
    for visible in visible_ranges(q, k, made, window, None):
        intervals = build_intervals(visible, past + t)
        assert (intervals.first.diff(dim=1) >= 0).all() and (intervals.last.diff(dim=1) >= 0).all()
        for found, turned in ((intervals, False), (intervals.transposed(), True)):
            own, other, first, last = (x.cpu().long().expand(12, -1) for x in found.tensors())
            for rows, number in ((own, (t, past + t)[turned]), (other, (past + t, t)[turned])):
                assert torch.equal(rows.sort(dim=1).values, torch.arange(number).expand(12, -1))
            place = torch.arange(other.shape[1])
            seen = (first[..., None] <= place) & (place < last[..., None])  # in the order of the lists
            back, across = own.argsort(dim=1), other.argsort(dim=1)
            seen = seen.gather(1, back[..., None].expand_as(seen)).gather(2, across[:, None].expand_as(seen))
            shown += seen.mT.int() if turned else seen.int()
    expected = torch.ones(3, 4, t, past + t, dtype=torch.bool).tril(past)
    heads_first = {name: None if x is None else x.cpu().transpose(1, 2) for name, x in made.items()}
    if made["k_keep"] is not None:
        expected &= heads_first["k_keep"][..., None, :]
    if made["q_bucket"] is not None:
        expected &= heads_first["q_bucket"][..., None] == heads_first["k_bucket"][..., None, :]
    expected |= torch.ones(t, past + t, dtype=torch.bool).tril(past).triu(past - window + 1)
    if made["q_keep"] is not None:
        expected &= heads_first["q_keep"][..., None]
    assert torch.equal(shown, 2 * expected.flatten(0, 1).int())


@pytest.mark.parametrize("marks, packed", [("none", True), ("both", False)])
def test_compiled_without_a_break(marks, packed):
    """In one graph: nothing of the marks is read by the host."""
    given = inputs(20, h=2, hkv=1)
    made = MARKS[marks](given)
    if packed:
        made["cu_seqlens"] = torch.tensor([0, 7, 20], device=DEVICE)
    leaves = [x.float().to(DEVICE).requires_grad_() for x in given.values()]

    def run(q, k, v):
        return sparse_attention(q, k, v, **made, window=2, backend="triton")

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        o = function(*leaves)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_lengths_share_one_graph():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse_attention, fullgraph=True, backend=count)
    for t in (17, 18, 23, 35):
        given = {name: x.float().to(DEVICE) for name, x in inputs(t, h=2).items()}
        options = MARKS["both"](given) | {"window": 2, "backend": "triton"}
        assert torch.equal(compiled(**given, **options), sparse_attention(**given, **options))
    assert count.frame_count == 2  # for the first length, and for any


def test_what_the_operators_say_of_themselves():
    """Shapes, strides and dtypes without computing, derivatives, no change of what is given: PyTorch's own checks."""
    from lcpt_kernels.triton.interval import autograd  # noqa: F401, which defines them

    given = inputs(3, h=2, hkv=1, dv=20)
    q, k, v = ([x.float().to(DEVICE).requires_grad_()] * 2 for x in given.values())
    made = dict.fromkeys(("q_keep", "k_keep", "q_bucket", "k_bucket")) | kept(given)
    ranges = visible_ranges(q[0], k[0], made, 1, None)
    lists = [x for visible in ranges for x in build_intervals(visible, 3).tensors()]
    operators = torch.ops.lcpt_kernels
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # others are compiled above
    torch.library.opcheck(operators.interval_attention.default, (q, k, v, lists, 0.3, [0.0, 0.5]), test_utils=checks)
    q, k, v = ([x.detach() for x in side] for side in (q, k, v))
    o, lse = operators.interval_attention(q, k, v, lists, 0.3, [0.0, 0.5])
    arguments = o, o, lse, q, k, v, lists, 0.3, [0.0, 0.5]
    torch.library.opcheck(operators.interval_attention_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("change, named", [({"dtype": torch.float64}, "torch.float64"), ({"dv": 512}, "512 wide, 256")])
def test_what_the_kernels_do_not_take_is_named(change, named, caplog):
    dtype = change.pop("dtype", torch.float32)
    given = {name: x.to(DEVICE).to(dtype) for name, x in inputs(3, **change).items()}
    with pytest.raises(ValueError, match=named):
        sparse_attention(**given, backend="triton")
    with caplog.at_level("INFO", logger="lcpt_kernels"):
        sparse_attention(**given)
    assert "sparse_attention" in caplog.text and named in caplog.text
