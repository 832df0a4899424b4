import re

import pytest
import torch
from lcpt_kernels import polynomial, polynomial_attention, squared_attention

ROWS = 6  # of one tile in most tests, instead of 256


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(polynomial, "ROWS", ROWS)


def inputs(t, *, b=2, h=2, hkv=None, d=4, dv=3, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shapes = {"q": (b, t, h, d), "k": (b, t, hkv or h, d), "v": (b, t, hkv or h, dv)}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("t", [1, 2, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3])
@pytest.mark.parametrize("degree", [2, 4, 6, 8])
def test_every_length_and_degree(agree, t, degree):
    agree(polynomial_attention, inputs(t), 1e-10, degree=degree, scale=0.5)


@pytest.mark.parametrize("offset", [None, 0.0, 0.7])
@pytest.mark.parametrize("scale", [1.0, 0.4, 3.0])
def test_scale_and_offset(agree, scale, offset):
    agree(polynomial_attention, inputs(2 * ROWS + 1), 1e-10, scale=scale, offset=offset)


@pytest.mark.parametrize("degree, shift", [(2, 1.0), (4, 1.0), (8, 0.3)])
def test_shift(agree, degree, shift):
    agree(polynomial_attention, inputs(2 * ROWS + 3), 1e-10, degree=degree, scale=0.25, shift=shift)


@pytest.mark.parametrize("shape", [{"h": 4, "hkv": 2}, {"h": 3, "hkv": 1}, {"d": 7, "dv": 2}, {"dv": 9}], ids=str)
def test_shapes(agree, shape):
    agree(polynomial_attention, inputs(2 * ROWS + 1, **shape), 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("factor", [1.0, 30.0, 1 / 30])
def test_precision_at_all_norms(agree, dtype, tolerance, factor):
    arguments = {name: factor * x for name, x in inputs(100, d=16, dv=16, dtype=dtype).items()}
    agree(polynomial_attention, arguments, tolerance, scale=1 / 16)


def test_the_default_offset_makes_the_scale_free():
    """(scale·q)·k with scale 1 is scale·(q·k): only with offset scale^degree do both give one result."""
    arguments = inputs(9)
    scaled = polynomial_attention(**arguments, scale=0.25)
    free = polynomial_attention(**arguments | {"q": arguments["q"] / 4}, scale=1.0, offset=0.25**4)
    torch.testing.assert_close(scaled, free, rtol=1e-12, atol=1e-12)


def test_squared_attention_inside_its_local_blocks_is_polynomial():
    """One block that holds every token, or two."""
    arguments = inputs(9)
    ab = {"a": torch.randn(2, 9, 2, 5).double(), "b": torch.randn(2, 9, 2, 5).double()}
    o = polynomial_attention(**arguments, scale=0.5)
    for block_size, local_blocks in ((9, 1), (5, 2)):
        local, _ = squared_attention(**arguments, **ab, scale=0.5, block_size=block_size, local_blocks=local_blocks)
        torch.testing.assert_close(local, o, rtol=1e-12, atol=1e-12)


def test_any_strides(agree):
    fused = torch.randn(2, 2 * ROWS + 1, 6, 4, dtype=torch.float64)
    q, k, v = fused.split(2, dim=2)
    agree(polynomial_attention, {"q": q, "k": k, "v": v}, 1e-10, do=torch.ones((), dtype=torch.float64).expand(q.shape))
    do = torch.randn(2, 4, 2, 2 * ROWS + 1, dtype=torch.float64).transpose(1, 3)
    agree(polynomial_attention, {"q": q, "k": k, "v": v}, 1e-10, do=do)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in inputs(ROWS + 2, b=1, d=2, dv=2).values()]
    assert torch.autograd.gradcheck(lambda q, k, v: polynomial_attention(q, k, v, offset=0.5), leaves)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_zero_over_zero_is_zero(backend):
    q, k, v = (x.requires_grad_() for x in inputs(ROWS + 1).values())
    o = polynomial_attention(0 * q, 0 * k, v, offset=0.0, backend=backend)
    o.sum().backward()
    for x in (o, q.grad, k.grad, v.grad):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("n", [1, ROWS, ROWS + 3])
def test_causality(n):
    first, other = inputs(3 * ROWS, dtype=torch.float32), inputs(3 * ROWS, dtype=torch.float32, seed=1)
    second = {name: torch.cat((x[:, :n], 100 * other[name][:, n:]), 1).requires_grad_() for name, x in first.items()}
    o, changed = polynomial_attention(**first), polynomial_attention(**second)
    assert torch.equal(o[:, :n], changed[:, :n]) and not torch.equal(o, changed)
    changed[:, :n].sum().backward()
    assert all(torch.equal(x.grad[:, n:], torch.zeros_like(x.grad[:, n:])) for x in second.values())


@pytest.mark.parametrize("degree, shift", [(4, 1.0), (8, 0.0)])
def test_packed_documents_on_a_device(monkeypatch, degree, shift):
    """Where the host does not read the offsets: gates between documents, in one call, with no trace of the others."""
    lengths = [1, ROWS, 0, 2, 2 * ROWS + 3, ROWS - 3, 0, 0]
    leaves = [x.requires_grad_() for x in inputs(sum(lengths), b=1).values()]
    options = {"degree": degree, "shift": shift, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
    expected = polynomial_attention(*leaves, **options)
    monkeypatch.setattr(polynomial, "is_on_device", lambda x: True)
    monkeypatch.setattr(polynomial, "each_document", None)
    found = polynomial_attention(*leaves, **options)
    do = torch.randn_like(expected)
    of_found, of_expected = ([o, *torch.autograd.grad(o, leaves, do)] for o in (found, expected))
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_reads_no_memory_that_nobody_wrote(agree, poisoned):
    agree(polynomial_attention, inputs(2 * ROWS + 1), 1e-10)


def test_memory_is_linear(monkeypatch, largest_tensor):
    monkeypatch.setattr(polynomial, "ROWS", 32)
    t = 1024
    leaves = [x.requires_grad_() for x in inputs(t, b=1, dtype=torch.float32).values()]
    with largest_tensor() as largest:
        polynomial_attention(*leaves).sum().backward()
    assert largest.n_bytes <= 4 * 2 * 32 * t  # a tile of both heads


@pytest.mark.parametrize(
    "change, named",
    [
        ({"degree": 3}, "degree 3"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"degree": -2}, "degree -2"),
        ({"backend": "x"}, "'x'"),
        ({"k": torch.ones(2, 4, 2, 5)}, "q has head dimension 4, k has 5"),
        ({"q": torch.ones(2, 4, 3, 4)}, "3 query heads are no multiple of 2"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        polynomial_attention(**inputs(4, dtype=torch.float32) | change)
