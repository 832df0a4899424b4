"""Gates, states and packed documents, the same for every family of linear cost."""

import re
from itertools import pairwise

import pytest
import torch
from lcpt_kernels import feature_attention, flurka_attention, polynomial_attention, squared_attention

C = 6  # block size
R = 2  # summaries of a block
SUMMARIES = ("phi_summary", "v_summary", "mass_summary")


def gate(b, t, h, strength=0.3):
    return -strength * torch.rand(b, t, h, dtype=torch.float64)


def squared(t, *, b=2, h=4, hkv=2, with_qk=True, gated=True):
    torch.manual_seed(0)
    made = {"a": torch.randn(b, t, h, 5), "b": torch.randn(b, t, hkv, 5), "v": torch.randn(b, t, hkv, 3)}
    if with_qk:
        made |= {"q": torch.randn(b, t, h, 4), "k": torch.randn(b, t, hkv, 4)}
    made = {name: x.double() for name, x in made.items()}
    return made | ({"log_gate": gate(b, t, hkv)} if gated else {})


def features(t, *, b=2, h=4, hkv=2, gated=True, with_qk=None):
    torch.manual_seed(0)
    made = {"phi_q": torch.rand(b, t, h, 7), "phi_k": torch.rand(b, t, hkv, 7), "v": torch.randn(b, t, hkv, 3)}
    made = {name: x.double() for name, x in made.items()}
    return made | ({"log_gate": gate(b, t, hkv)} if gated else {})


def flurka(t, *, b=2, h=4, hkv=2, gated=True, local="softmax", lengths=None):
    """lengths: of the packed documents, of which only whole blocks have summaries."""
    torch.manual_seed(0)
    n = sum(length // C for length in lengths or [t]) * R
    made = {"q": torch.rand(b, t, h, 4), "k": torch.rand(b, t, hkv, 4), "v": torch.randn(b, t, hkv, 3)}
    made |= {"phi_q": torch.rand(b, t, h, 5), "phi_summary": torch.rand(b, n, hkv, 5)}
    made |= {"v_summary": torch.randn(b, n, hkv, 3), "mass_summary": torch.rand(b, n, hkv)}
    made = {name: x.double() for name, x in made.items()}
    return made | ({"log_gate": gate(b, t, hkv)} if gated else {})


def cut(arguments, start, stop):
    """Tokens start … stop of one sequence, with the summaries of the blocks that they complete."""
    rows = slice(start // C * R, stop // C * R)
    return {name: x[:, rows] if name in SUMMARIES else x[:, start:stop] for name, x in arguments.items()}


FAMILIES = [
    pytest.param(squared_attention, squared, {"with_qk": True}, id="squared"),
    pytest.param(squared_attention, squared, {"with_qk": False}, id="squared without q, k"),
    pytest.param(feature_attention, features, {}, id="feature"),
    pytest.param(flurka_attention, flurka, {}, id="flurka"),
]
OFFSET = {"offset": 0.5}  # without one, the gradient of the first token's only weight is a rounding error


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("t", [1, C, C + 1, 4 * C, 5 * C + 1])
def test_gates(agree, function, inputs, shape, local_blocks, t):
    agree(function, inputs(t, **shape), 1e-10, block_size=C, local_blocks=local_blocks, **OFFSET)


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_a_gate_of_zeros_is_none(function, inputs, shape):
    arguments = inputs(4 * C + 1, gated=False, **shape)
    none, _ = function(**arguments, block_size=C, **OFFSET)
    zeros, _ = function(**arguments, log_gate=torch.zeros_like(arguments["v"][..., 0]), block_size=C, **OFFSET)
    torch.testing.assert_close(zeros, none, rtol=1e-12, atol=1e-12)


def shut(arguments, tokens, log_gate=-torch.inf):
    """The gate of these tokens lets nothing pass."""
    gate = arguments["log_gate"].clone()
    gate[:, tokens] = log_gate
    return arguments | {"log_gate": gate}


SHUT = [0, 3, C, 2 * C - 1, 2 * C, 2 * C + 1, 4 * C + 2]  # a block's first, last, in one, one after the other


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("log_gate", [-1e4, -torch.inf])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_gate_that_shuts_leaves_nothing_behind(function, inputs, shape, log_gate, backend):
    """What follows is as if the sequence began there, and nothing is NaN."""
    arguments, start, options = inputs(5 * C, **shape), 2 * C, {"block_size": C, "backend": backend, **OFFSET}
    whole, _ = function(**shut(arguments, start, log_gate), **options)
    alone, _ = function(**cut(arguments, start, 5 * C), **options)
    torch.testing.assert_close(whole[:, start:], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks", [1, 2])
def test_gates_that_shut(agree, function, inputs, shape, local_blocks):
    arguments = shut(inputs(5 * C + 1, **shape), SHUT)
    agree(function, arguments, 1e-10, block_size=C, local_blocks=local_blocks, **OFFSET)
    single = {name: x.float() for name, x in arguments.items()}
    agree(function, single, 1e-5, block_size=C, local_blocks=local_blocks, **OFFSET)


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_gate_of_minus_infinity_has_no_gradient(function, inputs, shape, backend):
    arguments = shut(inputs(5 * C, **shape), SHUT)
    options = {"block_size": C, "backend": backend, **OFFSET}
    gradient = with_gradients(arguments, lambda leaves: function(**leaves, **options)[0])["log_gate"]
    assert torch.equal(gradient[:, SHUT], torch.zeros_like(gradient[:, SHUT])) and gradient.isfinite().all()


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("strength", [50.0, 2000.0])
def test_large_sums_of_gates(agree, function, inputs, shape, strength):
    """fp32, sums down to some −60,000 a block, of which what decides are small differences."""
    c = 32
    arguments = {name: x for name, x in inputs(4 * c, **shape).items() if name not in SUMMARIES}
    rows = {name: x[:, : 4 * R] for name, x in inputs(4 * C, **shape).items() if name in SUMMARIES}
    gate = 0.1 * arguments["log_gate"]
    gate[:, ::3] -= strength
    arguments = {name: x.float() for name, x in (arguments | rows | {"log_gate": gate}).items()}
    agree(function, arguments, 1e-5, block_size=c, **OFFSET)


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_gate_precision(agree, function, inputs, shape):
    """fp32, 300 tokens, gates strong enough that e^{-G} would overflow."""
    arguments = inputs(300, **shape) | {"log_gate": gate(2, 300, 2, strength=2.0)}
    agree(function, {name: x.float() for name, x in arguments.items()}, 1e-5, block_size=C, **OFFSET)


def with_gradients(arguments, run):
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    o = run(leaves)
    torch.manual_seed(1)
    gradients = torch.autograd.grad(o, list(leaves.values()), torch.randn(o.shape, dtype=o.dtype))
    return {"o": o.detach()} | dict(zip(leaves, gradients, strict=True))


def in_pieces(function, cuts, **options):
    def run(arguments):
        outputs, state = [], None
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            o, state = function(**cut(arguments, start, stop), initial_state=state, output_final_state=True, **options)
            outputs.append(o)
        return torch.cat(outputs, dim=1)

    return run


T = 4 * C + 2


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "cuts",
    [
        *([0, n, T] for n in (1, C - 1, C, C + 1, 2 * C, 2 * C + 1, 3 * C - 1, T - 1)),
        [0, 3, 4, C, 3 * C, T],
        list(range(T + 1)),
    ],
    ids=str,
)
def test_pieces_make_the_whole(function, inputs, shape, local_blocks, gated, cuts):
    """Output and every gradient, which flows back through the states."""
    options = {"block_size": C, "local_blocks": local_blocks, **OFFSET}
    arguments = inputs(T, gated=gated, **shape)
    if gated:
        arguments = shut(arguments, [3, 2 * C])
    whole = with_gradients(arguments, lambda leaves: function(**leaves, **options)[0])
    pieces = with_gradients(arguments, in_pieces(function, cuts, **options))
    for name, expected in whole.items():
        torch.testing.assert_close(pieces[name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks", [1, 2])
def test_a_state_does_not_grow(function, inputs, shape, local_blocks):
    for t in (1, C, 3 * C + 1, 7 * C, 9 * C - 1):
        _, state = function(**inputs(t, **shape), output_final_state=True, block_size=C, local_blocks=local_blocks)
        assert state.S.dtype == torch.float64 and state.tail["v"].shape[1] < C * local_blocks
        for x in (state.S, *state.tail.values()):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()  # not a view of the whole
        single = {n: x.float() for n, x in inputs(t, **shape).items()}
        _, single = function(**single, output_final_state=True, block_size=C)
        assert single.S.dtype == torch.float32
        assert state.S.shape[1] == 2  # a state for each key-value head, not for each query head


@pytest.mark.parametrize(
    "function, inputs, shape",
    [
        *FAMILIES,
        pytest.param(polynomial_attention, squared, {"with_qk": True, "gated": False}, id="polynomial"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("lengths", [[C, 1, 2 * C + 1, 3], [T], [1, 1, 1], [5, 0, 7]], ids=str)
def test_packed_documents_are_documents_alone(function, inputs, shape, backend, lengths):
    arguments = inputs(sum(lengths), b=1, **shape, **({"lengths": lengths} if inputs is flurka else {}))
    options = OFFSET | {"backend": backend}
    if function is polynomial_attention:
        arguments = {name: arguments[name] for name in "qkv"}
    else:
        options |= {"block_size": C}
        arguments = shut(arguments, [0, sum(lengths) // 2])
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    rows = [0, *(R * torch.tensor([length // C for length in lengths]).cumsum(0)).tolist()]

    def output(result):
        return result[0] if isinstance(result, tuple) else result

    def alone(leaves):
        documents = [
            {name: x[:, m:n] if name in SUMMARIES else x[:, i:j] for name, x in leaves.items()}
            for (i, j), (m, n) in zip(pairwise(ends.tolist()), pairwise(rows), strict=True)
            if i < j
        ]
        return torch.cat([output(function(**document, **options)) for document in documents], dim=1)

    packed = with_gradients(arguments, lambda leaves: output(function(**leaves, cu_seqlens=ends, **options)))
    for name, expected in with_gradients(arguments, alone).items():
        torch.testing.assert_close(packed[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"cu_seqlens": [0, 5]}, ["T = 13", "5"]),
        ({"cu_seqlens": [0, 9, 5, 13]}, ["rise", "9, 5"]),
        ({"cu_seqlens": [1, 13]}, ["from 0"]),
        ({"output_final_state": True, "backend": "reference"}, ["reference"]),
        ({"cu_seqlens": (0.0, 13.0)}, ["torch.float32", "int32"]),
        ({"cu_seqlens": (False, True)}, ["torch.bool", "int32"]),
        ({"log_gate": torch.zeros(1, 13, 3)}, ["log_gate", "[1, 13, 3]", "[1, 13, 2]"]),
        ({"block_size": 0}, ["block_size 0"]),
        ({"local_blocks": 3}, ["local_blocks 3"]),
    ],
    ids=lambda x: str(x)[:40],
)
@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_what_does_not_fit_is_named(function, inputs, shape, change, parts):
    change = {name: torch.tensor(x) if name == "cu_seqlens" else x for name, x in change.items()}
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        function(**({"block_size": C} | inputs(13, b=1, **shape) | change))


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_no_sequences(function, inputs, shape):
    arguments = {name: x.requires_grad_() for name, x in inputs(13, b=0, **shape).items()}
    o, state = function(**arguments, output_final_state=True, block_size=C)
    assert o.shape == (0, 13, 4, 3) and state.S.shape[:2] == (0, 2)
    o, _ = function(**cut(arguments, 0, 3), initial_state=state, block_size=C)
    gradients = torch.autograd.grad(o.sum(), list(arguments.values()))
    assert all(x.shape == dx.shape for x, dx in zip(arguments.values(), gradients, strict=True))


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_a_state_of_another_kind_is_refused(function, inputs, shape):
    _, state = function(**cut(inputs(13, **shape), 0, 5), output_final_state=True, block_size=C)
    for changed, options, part in (
        (inputs(3, gated=False, **shape), {"block_size": 100}, "log_gate"),
        (inputs(3, **shape), {"block_size": 4, "local_blocks": 1}, "5 tokens"),
        (inputs(3, b=1, **shape), {"block_size": 100}, "initial_state.S"),
    ):
        with pytest.raises(ValueError, match=part):
            function(**changed, initial_state=state, **options)


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_poisoned_memory(agree, poisoned, function, inputs, shape):
    agree(function, inputs(3 * C + 2, **shape), 1e-10, block_size=C, local_blocks=2, **OFFSET)


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_gradcheck(function, inputs, shape):
    """Against finite differences, through a state that a first piece leaves."""
    arguments = inputs(2 * C + 3, b=1, h=2, hkv=1, **shape)
    names = list(arguments)

    def run(*tensors):
        leaves = dict(zip(names, tensors, strict=True))
        return in_pieces(function, [0, C + 2, 2 * C + 3], block_size=C, local_blocks=1, **OFFSET)(leaves)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in arguments.values()], fast_mode=True)
