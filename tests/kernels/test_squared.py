import re

import pytest
import torch
from lcpt_kernels import squared_attention
from torch.nn.functional import normalize

C = 6  # block size of most tests


def inputs(t, *, b=2, h=2, hkv=None, r=5, d=4, dv=3, with_qk=True, dtype=torch.float64, seed=0):
    """Random arguments; a and b are unit vectors, so that 1 + s stays positive."""
    torch.manual_seed(seed)
    hkv = hkv or h
    made = {
        "a": normalize(torch.randn(b, t, h, r, dtype=torch.float64), dim=-1),
        "b": normalize(torch.randn(b, t, hkv, r, dtype=torch.float64), dim=-1),
        "v": torch.randn(b, t, hkv, dv, dtype=torch.float64),
    }
    if with_qk:
        made |= {"q": torch.randn(b, t, h, d, dtype=torch.float64), "k": torch.randn(b, t, hkv, d, dtype=torch.float64)}
    return {name: x.to(dtype) for name, x in made.items()}


@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("t", [1, 2, C - 1, C, C + 1, 2 * C, 2 * C + 3, 5 * C + 1])
def test_every_length(agree, t, local_blocks, with_qk):
    """Without an offset the first token sees itself alone, and the gradient of its weight is a rounding error."""
    agree(squared_attention, inputs(t, with_qk=with_qk), 1e-10, block_size=C, local_blocks=local_blocks, offset=0.5)


@pytest.mark.parametrize("coefficients", [(0, 0, 1), (1, 1, 0.5), (1, 1, 0), (0.3, 0, 2)])
@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("offset", [None, 0.0, 0.7])
def test_coefficients_and_offset(agree, coefficients, with_qk, offset):
    arguments = inputs(4 * C + 1, with_qk=with_qk)
    agree(squared_attention, arguments, 1e-10, block_size=C, coefficients=coefficients, offset=offset)


@pytest.mark.parametrize("scale", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("degree", [2, 4, 6, 8])
def test_degree_and_scale(agree, degree, scale):
    agree(squared_attention, inputs(3 * C + 2), 1e-10, block_size=C, degree=degree, scale=scale)


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("degree, shift", [(2, 1.0), (4, 1.0), (4, 0.3), (8, 2.0)])
def test_shift(agree, degree, shift, local_blocks):
    """A score of 0 has the weight shift^degree, so keys after the query must be masked after the shift."""
    agree(
        squared_attention,
        inputs(3 * C + 2),
        1e-10,
        block_size=C,
        local_blocks=local_blocks,
        degree=degree,
        scale=0.25,
        shift=shift,
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"h": 4, "hkv": 2},
        {"h": 6, "hkv": 1},
        {"d": 7, "dv": 2},
        {"dv": 9},
        {"b": 1},
        {"r": 1},
        {"r": 8},
        {"r": 12},
        {"r": 21},
    ],
    ids=str,
)
def test_shapes(agree, shape):
    agree(squared_attention, inputs(3 * C + 2, **shape), 1e-10, block_size=C)
    agree(squared_attention, inputs(3 * C + 2, with_qk=False, **shape), 1e-10, block_size=C, local_blocks=2, offset=0.5)


@pytest.mark.parametrize("block_size", [1, 2, 7, 1000])
@pytest.mark.parametrize("local_blocks", [1, 2])
def test_block_sizes(agree, block_size, local_blocks):
    agree(squared_attention, inputs(23), 1e-10, block_size=block_size, local_blocks=local_blocks)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("local_blocks", [1, 2])
def test_precision(agree, dtype, tolerance, with_qk, local_blocks):
    arguments = inputs(150, r=16, d=16, dv=16, with_qk=with_qk, dtype=dtype)
    agree(squared_attention, arguments, tolerance, block_size=32, local_blocks=local_blocks, scale=1 / 16, offset=1e-3)


@pytest.mark.parametrize("factor", [30.0, 1 / 30])
def test_norms(agree, factor):
    """×30: local weights of 30⁸ beside those of the state. ÷30: everything small beside the default offset."""
    arguments = {name: factor * x for name, x in inputs(100, r=16, d=16, dtype=torch.float32).items()}
    agree(squared_attention, arguments, 1e-5, block_size=16, scale=1 / 16)


def test_any_strides(agree):
    """Heads before tokens, views of one fused projection, and a column stride of 2."""
    t, h, d = 2 * C + 3, 2, 4
    fused = torch.randn(2, t, 3 * h, d, dtype=torch.float64)
    q, k, v = fused.split(h, dim=2)
    a = torch.randn(2, h, t, 5, dtype=torch.float64).transpose(1, 2)
    b = torch.randn(2, t, h, 10, dtype=torch.float64)[..., ::2]
    agree(squared_attention, {"a": a, "b": b, "v": v, "q": q, "k": k}, 1e-10, block_size=C)
    one_head = torch.randn(2, t, 1, d, dtype=torch.float64).expand(2, t, h, d)  # stride 0
    agree(squared_attention, {"a": one_head, "b": one_head, "v": one_head}, 1e-10, block_size=C)


@pytest.mark.parametrize("strides", ["stride 0", "transposed"])
def test_any_strides_of_the_incoming_gradient(agree, strides):
    arguments = inputs(2 * C + 3)
    shape = (2, 2 * C + 3, 2, 3)
    do = torch.ones((), dtype=torch.float64).expand(shape)
    if strides == "transposed":
        do = torch.randn(shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    agree(squared_attention, arguments, 1e-10, do=do, block_size=C)


@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("local_blocks", [1, 2])
def test_gradcheck(with_qk, local_blocks):
    arguments = inputs(8, b=1, r=3, d=2, dv=2, with_qk=with_qk)
    leaves = [x.requires_grad_() for x in arguments.values()]

    def function(a, b, v, q=None, k=None):
        return squared_attention(a, b, v, q=q, k=k, block_size=3, local_blocks=local_blocks, offset=0.5)[0]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_zero_over_zero_is_zero(with_qk, backend):
    """All weights 0 and no offset: the output is 0 and no gradient is anything but 0."""
    arguments = inputs(2 * C + 1, with_qk=with_qk)
    leaves = {name: x.mul_(name == "v").requires_grad_() for name, x in arguments.items()}
    o, _ = squared_attention(**leaves, block_size=C, offset=0.0, backend=backend)
    o.sum().backward()
    assert torch.equal(o, torch.zeros_like(o))
    for name, x in leaves.items():
        assert torch.equal(x.grad, torch.zeros_like(x)), name


def test_zero_keys_for_a_while(agree):
    """0/0 in some rows only: the first rows see nothing, the later ones see tokens."""
    arguments = inputs(3 * C)
    for name in ("b", "k"):
        arguments[name][:, : C + 2] = 0
    agree(squared_attention, arguments, 1e-10, block_size=C, offset=0.0)


@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("n", [1, C - 1, C, C + 2, 2 * C])
def test_causality(with_qk, n):
    """What comes later changes no bit of an output before it, and gets no gradient from it."""
    first = inputs(3 * C + 1, with_qk=with_qk, dtype=torch.float32)
    other = inputs(3 * C + 1, with_qk=with_qk, dtype=torch.float32, seed=1)
    second = {name: torch.cat((x[:, :n], 100 * other[name][:, n:]), 1).requires_grad_() for name, x in first.items()}
    o, _ = squared_attention(**first, block_size=C)
    changed, _ = squared_attention(**second, block_size=C)
    assert torch.equal(o[:, :n], changed[:, :n]) and not torch.equal(o, changed)
    changed[:, :n].sum().backward()
    for name, x in second.items():
        assert torch.equal(x.grad[:, n:], torch.zeros_like(x.grad[:, n:])), name


def test_blocks_of_any_size_mean_the_same_without_q_and_k():
    arguments = inputs(29, with_qk=False)
    outputs = [squared_attention(**arguments, block_size=c, local_blocks=n)[0] for c in (1, 4, 64) for n in (1, 2)]
    for o in outputs[1:]:
        torch.testing.assert_close(o, outputs[0], rtol=1e-11, atol=1e-11)


def test_what_is_not_local_is_not_exact():
    """q and k of earlier blocks do not matter, those of local ones do: at local_blocks 2, one block back."""
    arguments = inputs(3 * C)
    changed = arguments | {"k": arguments["k"].clone()}
    changed["k"][:, :C] += 1
    for local_blocks, reach in ((1, C), (2, 2 * C)):
        o, other = (squared_attention(**x, block_size=C, local_blocks=local_blocks)[0] for x in (arguments, changed))
        assert torch.equal(o[:, reach:], other[:, reach:])
        assert not torch.equal(o[:, reach - 1], other[:, reach - 1])


@pytest.mark.parametrize("with_qk", [True, False])
def test_reads_no_memory_that_nobody_wrote(agree, poisoned, with_qk):
    agree(squared_attention, inputs(3 * C + 1, with_qk=with_qk), 1e-10, block_size=C, coefficients=(1, 1, 0.5))


def test_deterministic():
    def run():
        leaves = {name: x.requires_grad_() for name, x in inputs(100, r=16, dtype=torch.float32).items()}
        o, _ = squared_attention(**leaves, block_size=16)
        o.square().sum().backward()
        return [o.detach(), *(x.grad for x in leaves.values())]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def test_memory_is_linear(largest_tensor):
    """What is kept for backward, and the largest tensor of forward and backward."""

    def cost(t):
        leaves = {name: x.requires_grad_() for name, x in inputs(t, b=1, r=8, dtype=torch.float32).items()}
        kept = 0

        def keep(x):
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        with largest_tensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            squared_attention(**leaves, block_size=32)[0].sum().backward()
        return kept, largest.n_bytes

    (kept, largest), (kept_double, largest_double) = cost(1024), cost(2048)
    assert kept_double == 2 * kept
    assert kept == 4 * 1024 * 2 * (5 + 5 + 4 + 4 + 3 + 3 + 1 + 6)  # a b q k v o z, heads of 8, 8, 4, 4, 3, 3, 1
    assert largest_double <= 2 * largest and largest < 4 * 1024 * 1024


def test_no_final_state_yet():
    assert squared_attention(**inputs(3))[1] is None


@pytest.mark.parametrize(
    "change, named",
    [
        ({"block_size": 0}, "block_size 0"),
        ({"block_size": -4}, "block_size -4"),
        ({"local_blocks": 3}, "local_blocks 3"),
        ({"local_blocks": 0}, "local_blocks 0"),
        ({"degree": 3}, "degree 3"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"degree": 0}, "degree 0"),
        ({"backend": "cuda"}, "'cuda'"),
        ({"q": None}, "q and k are given together"),
        ({"k": None}, "q and k are given together"),
        ({"a": torch.ones(2, 4, 2, 6)}, "a has head dimension 6, b has 5"),
        ({"a": torch.ones(2, 4, 3, 5)}, "3 query heads are no multiple of 2"),
        ({"a": torch.ones(2, 4, 4, 5)}, "q has 2 heads, a has 4"),
        ({"v": torch.ones(2, 4, 1, 3)}, "b has 2 heads, v has 1"),
        ({"v": torch.ones(2, 9, 2, 3)}, "[2, 9]"),
        ({"v": torch.ones(4, 2, 3)}, "v has 3 dimensions (4, 2, 3)"),
        ({"k": torch.ones(2, 4, 2, 9)}, "q has head dimension 4, k has 9"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, named):
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        squared_attention(**inputs(4, dtype=torch.float32) | change)
    assert "\n" not in str(caught.value)


def test_no_tokens():
    with pytest.raises(ValueError, match="no tokens"):
        squared_attention(**inputs(0))
