"""sparse_attention against its definition, the definition against plain Python, and both against PyTorch's SDPA."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from lcpt_kernels import sparse, sparse_attention

ROWS = 5  # of one tile in most tests, instead of 128


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sparse, "ROWS", ROWS)


def inputs(t, *, past=0, b=2, h=4, hkv=2, d=8, dv=None, dtype=torch.float64):
    shapes = {"q": (b, t, h, d), "k": (b, past + t, hkv, d), "v": (b, past + t, hkv, dv or d)}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def kept(given, share=0.5):
    shapes = {name: (*given[name].shape[:2], given["q"].shape[2]) for name in "qk"}
    return {f"{name}_keep": torch.rand(shape) < share for name, shape in shapes.items()}


def hashed(given, buckets=4):
    shapes = {name: (*given[name].shape[:2], given["q"].shape[2]) for name in "qk"}
    return {f"{name}_bucket": torch.randint(buckets, shape) for name, shape in shapes.items()}


MARKS = {
    "kept": kept,
    "hashed": hashed,
    "both": lambda given: kept(given, 0.8) | hashed(given, 2),
    "none": lambda given: {},
}


def results(function, given, do, options):
    """The output and the gradient of q, k and v, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    o = function(**leaves, **options)
    return {"o": o.detach()} | dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), do), strict=True))


def dense(q, k, v, scale=None):
    """PyTorch's SDPA, causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def test_the_definition_written_out():
    """Loops over tokens: who is seen, and a softmax of them."""
    given = inputs(9, b=1, h=2, hkv=1, d=3)
    marks = kept(given, 0.7) | hashed(given, 2)
    found = sparse_attention(**given, **marks, scale=0.7, backend="reference")
    q, k, v = (given[name][0] for name in "qkv")
    empty = 0
    for head in range(2):
        qk, kk, qb, kb = (marks[name][0, :, head] for name in ("q_keep", "k_keep", "q_bucket", "k_bucket"))
        for t in range(9):
            seen = [s for s in range(t + 1) if qk[t] and kk[s] and qb[t] == kb[s]]
            weights = [math.exp(0.7 * float(q[t, head] @ k[s, 0])) for s in seen]
            expected = sum((w * v[s, 0] for w, s in zip(weights, seen, strict=True)), torch.zeros(3).double())
            empty += not seen
            torch.testing.assert_close(found[0, t, head], expected / (sum(weights) or 1), rtol=1e-12, atol=1e-12)
    assert 0 < empty < 18


@pytest.mark.parametrize("t", [1, 2, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 2])
@pytest.mark.parametrize("marks", MARKS)
def test_every_length(agree, marks, t):
    given = inputs(t)
    agree(sparse_attention, given, 1e-10, **MARKS[marks](given))


@pytest.mark.parametrize("past", [1, ROWS, 2 * ROWS + 3])
@pytest.mark.parametrize("t", [1, 2 * ROWS + 1])
@pytest.mark.parametrize("marks", MARKS)
def test_keys_of_earlier_tokens(agree, marks, t, past):
    given = inputs(t, past=past)
    agree(sparse_attention, given, 1e-10, **MARKS[marks](given))


@pytest.mark.parametrize("window", [1, 2, ROWS + 2, 40])
@pytest.mark.parametrize("past", [0, 2 * ROWS + 3])
@pytest.mark.parametrize("t", [1, 2 * ROWS + 1])
@pytest.mark.parametrize("marks", MARKS)
def test_a_window(agree, marks, t, past, window):
    given = inputs(t, past=past)
    agree(sparse_attention, given, 1e-10, **MARKS[marks](given), window=window)


def test_a_window_by_hand():
    """Every key once, whether the window, the bucket or both show it."""
    given = inputs(9, b=1, h=1, hkv=1, d=3)
    marks = kept(given, 0.7) | hashed(given, 2)
    for window in (1, 3):
        found = sparse_attention(**given, **marks, scale=1.0, window=window)
        q, k, v = (given[name][0, :, 0] for name in "qkv")
        qk, kk, qb, kb = (marks[name][0, :, 0] for name in ("q_keep", "k_keep", "q_bucket", "k_bucket"))
        for t in range(9):
            seen = [s for s in range(t + 1) if qk[t] and (t - s < window or (kk[s] and qb[t] == kb[s]))]
            expected = (k[seen] @ q[t]).softmax(-1) @ v[seen] if seen else torch.zeros(3).double()
            torch.testing.assert_close(found[0, t, 0], expected, rtol=1e-12, atol=1e-12)


def test_a_window_over_everything_is_dense():
    given = inputs(3 * ROWS + 1)
    do, marks = torch.randn_like(given["q"]), hashed(given) | {"k_keep": kept(given)["k_keep"]}
    found = results(sparse_attention, given, do, marks | {"window": 3 * ROWS + 1, "scale": 0.3})
    for name, x in results(dense, given, do, {"scale": 0.3}).items():
        torch.testing.assert_close(found[name], x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        {"h": 4, "hkv": 4},
        {"h": 3, "hkv": 1},
        {"d": 32},
        {"d": 64},
        {"d": 128},
        {"d": 7, "dv": 2},
        {"dv": 9},
        {"b": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("marks", ["kept", "hashed"])
def test_shapes(agree, marks, shape):
    given = inputs(2 * ROWS + 1, **shape)
    agree(sparse_attention, given, 1e-10, **MARKS[marks](given))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("norm", [1.0, 6.0, 1 / 30])
@pytest.mark.parametrize("marks, window", [("kept", 0), ("hashed", 0), ("hashed", 3)])
def test_precision_at_all_norms(agree, marks, window, dtype, tolerance, norm):
    """Over many tiles, so that a key's gradient comes in many parts."""
    given = {name: norm * x for name, x in inputs(300, d=64, dtype=dtype).items()}
    agree(sparse_attention, given, tolerance, **MARKS[marks](given), window=window)


@pytest.mark.parametrize("d", [32, 64, 128])
def test_one_bucket_is_dense(d):
    given = inputs(3 * ROWS + 1, d=d)
    one = {f"{name}_bucket": torch.full((2, 3 * ROWS + 1, 4), -7) for name in "qk"}
    do = torch.randn_like(given["q"])
    expected = results(dense, given, do, {"scale": 0.3})
    for marks in ({}, one, kept(given, 2.0)):
        found = results(sparse_attention, given, do, {"scale": 0.3} | marks)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_any_integers_name_buckets(agree, dtype):
    given = inputs(2 * ROWS + 1)
    names = torch.tensor([-128, -1, 0, 126], dtype=dtype)  # differences that int8 cannot hold
    marks = {name: names[x] for name, x in hashed(given, 4).items()}
    agree(sparse_attention, given, 1e-10, **marks)


def test_buckets_of_very_different_size(agree):
    """Most tokens in one bucket, the others alone; what tiles span differs much."""
    given = inputs(6 * ROWS + 3)
    marks = {name: torch.where(x < 30, 0, x) for name, x in hashed(given, 40).items()}
    agree(sparse_attention, given, 1e-10, **marks)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("blind", ["all queries dropped", "all keys dropped", "no bucket shared", "some"])
def test_who_sees_nothing_gives_nothing(backend, blind):
    leaves = {name: x.requires_grad_() for name, x in inputs(2 * ROWS + 1).items()}
    t, marks = 2 * ROWS + 1, {}
    if blind == "no bucket shared":
        marks = {"q_bucket": torch.zeros(2, t, 4).int(), "k_bucket": torch.ones(2, t, 4).int()}
    elif blind == "some":
        marks = {"k_keep": (torch.arange(t) >= 3)[None, :, None].expand(2, t, 4)}
    else:
        marks = {"q_keep" if "queries" in blind else "k_keep": torch.zeros(2, t, 4, dtype=torch.bool)}
    o = sparse_attention(**leaves, **marks, backend=backend)
    o.sum().backward()
    silent = slice(0, 3 if blind == "some" else t)
    for x in (o, leaves["q"].grad, leaves["k"].grad, leaves["v"].grad):
        assert torch.equal(x[:, silent], torch.zeros_like(x[:, silent])) and x.isfinite().all()
    if blind == "some":
        assert (o[:, 3:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("marks", MARKS)
def test_packed_documents_are_as_alone(marks, window, backend):
    ends = [0, 1, 7, 7, 9, 9 + 3 * ROWS]
    given = inputs(ends[-1], b=1)
    made = MARKS[marks](given)
    do = torch.randn_like(given["q"])
    options = made | {"cu_seqlens": torch.tensor(ends), "backend": backend, "window": window}
    packed = results(sparse_attention, given, do, options)
    for start, stop in ((0, 1), (1, 7), (7, 9), (9, ends[-1])):
        alone = results(
            sparse_attention,
            {name: x[:, start:stop] for name, x in given.items()},
            do[:, start:stop],
            {name: x[:, start:stop] for name, x in made.items()} | {"window": window},
        )
        for name, x in alone.items():
            torch.testing.assert_close(packed[name][:, start:stop], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, ROWS, ROWS + 3])
@pytest.mark.parametrize("marks", ["kept", "hashed"])
def test_causality(marks, n):
    """What comes later, its marks too, changes nothing before it. Tiles hold other queries: equal up to rounding."""
    first, other = inputs(4 * ROWS), inputs(4 * ROWS)
    second = {name: torch.cat((x[:, :n], 100 * other[name][:, n:]), 1).requires_grad_() for name, x in first.items()}
    old, new = MARKS[marks](first), MARKS[marks](first)
    changed_marks = {name: torch.cat((x[:, :n], new[name][:, n:]), 1) for name, x in old.items()}
    o, changed = sparse_attention(**first, **old), sparse_attention(**second, **changed_marks)
    torch.testing.assert_close(changed[:, :n], o[:, :n], rtol=1e-12, atol=1e-12)
    assert not torch.equal(o, changed)
    changed[:, :n].sum().backward()
    assert all(torch.equal(x.grad[:, n:], torch.zeros_like(x.grad[:, n:])) for x in second.values())


def test_any_strides(agree):
    fused = torch.randn(2, 2 * ROWS + 1, 6, 4, dtype=torch.float64)
    q, k, v = fused.split(2, dim=2)
    given = {"q": q, "k": k, "v": v}
    marks = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in (kept(given) | hashed(given)).items()}
    agree(sparse_attention, given, 1e-10, do=torch.ones((), dtype=torch.float64).expand(q.shape), **marks)
    do = torch.randn(2, 4, 2, 2 * ROWS + 1, dtype=torch.float64).transpose(1, 3)
    agree(sparse_attention, given, 1e-10, do=do, **marks)


def test_gradcheck():
    given = inputs(ROWS + 3, b=1, h=2, hkv=1, d=2)
    marks = kept(given, 0.8) | hashed(given, 2)
    leaves = [x.requires_grad_() for x in given.values()]
    assert torch.autograd.gradcheck(lambda q, k, v: sparse_attention(q, k, v, **marks), leaves)
    assert torch.autograd.gradcheck(lambda q, k, v: sparse_attention(q, k, v, **marks, window=2), leaves)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("marks", MARKS)
def test_flex_attention_with_the_same_mask(marks, window):
    """PyTorch's, uncompiled: another hand's softmax over a mask. On a CPU it has no gradients."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t, given = 40, inputs(40, dtype=torch.float32)
    made = MARKS[marks](given)

    def seen(b, h, i, j):
        by_marks = i >= j
        if "k_keep" in made:
            by_marks = by_marks & made["k_keep"][b, j, h]
        if "q_bucket" in made:
            by_marks = by_marks & (made["q_bucket"][b, i, h] == made["k_bucket"][b, j, h])
        by_marks = by_marks | ((i >= j) & (i - j < window))
        return by_marks & made["q_keep"][b, i, h] if "q_keep" in made else by_marks

    mask = create_block_mask(seen, 2, 4, t, t, device="cpu")

    q, k, v = (x.transpose(1, 2) for x in given.values())
    expected = flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(sparse_attention(**given, **made, window=window), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("marks", MARKS)
def test_reads_no_memory_that_nobody_wrote(agree, poisoned, marks):
    given = inputs(2 * ROWS + 1)
    agree(sparse_attention, given, 1e-10, **MARKS[marks](given))


@pytest.mark.parametrize("marks", ["kept", "hashed"])
def test_the_same_bits_every_time(marks):
    given = inputs(4 * ROWS, dtype=torch.float32)
    made, do = MARKS[marks](given), torch.randn(2, 4 * ROWS, 4, 8)
    first, second = (results(sparse_attention, given, do, made) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("buckets", [1, 8])
def test_memory_is_linear(monkeypatch, largest_tensor, buckets):
    """The largest tensor is one tile of scores, or the inputs themselves."""
    monkeypatch.setattr(sparse, "ROWS", 32)
    given = inputs(2048, b=1, dtype=torch.float32)
    marks = hashed(given, buckets)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    with largest_tensor() as largest:
        sparse_attention(**leaves, **marks).sum().backward()
    assert largest.n_bytes <= max(4 * 32 * 2 * 2048 / buckets, 8 * 4 * 2048 * 4)


def test_only_pairs_that_meet_cost():
    """16 buckets of much more than a tile: about a sixteenth of the products. Half dropped: a quarter."""
    from torch.utils.flop_counter import FlopCounterMode

    given = {name: x.requires_grad_() for name, x in inputs(1600, b=1, h=2, hkv=2, dtype=torch.float32).items()}
    flops = {}
    for name, marks in (("all", {}), ("hashed", hashed(given, 16)), ("kept", kept(given))):
        with FlopCounterMode(display=False) as counter:
            sparse_attention(**given, **marks).sum().backward()
        flops[name] = counter.get_total_flops()
    assert flops["all"] / flops["hashed"] == pytest.approx(16, rel=0.15)
    assert flops["all"] / flops["kept"] == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"backend": "x"}, "'x'"),
        ({"k": torch.ones(2, 4, 2, 5)}, "q has head dimension 8, k has 5"),
        ({"q_keep": torch.ones(2, 4, 2, dtype=torch.bool)}, "q_keep is [2, 4, 2]; it must be [2, 4, 4]"),
        ({"k_keep": torch.ones(2, 4, 4)}, "k_keep is torch.float32; it must be bool"),
        ({"k_bucket": torch.ones(2, 4, 4).int()}, "k_bucket is given alone"),
        ({"q_bucket": torch.ones(2, 4, 4), "k_bucket": torch.ones(2, 4, 4).int()}, "q_bucket is torch.float32"),
        ({"q_bucket": torch.ones(2, 4, 4).int(), "k_bucket": torch.full((2, 4, 4), 2**62)}, str(2**62)),
        ({"window": -1}, "window -1"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "B = 1, not 2"),
        ({"v": torch.ones(2, 5, 2, 8)}, "v has 5"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        sparse_attention(**inputs(4, dtype=torch.float32) | change)


def test_packed_documents_have_no_earlier_keys():
    with pytest.raises(ValueError, match="q has 4 tokens, k 6"):
        sparse_attention(**inputs(4, past=2, b=1), cu_seqlens=torch.tensor([0, 4]))
