"""What PyTorch does with an operator: compiles, checkpoints and casts around it."""

import pytest
import torch
from lcpt_kernels import flurka_attention, squared_attention
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.kernels.test_exchange import Ranks
from tests.kernels.test_limits import ATTENTIONS, MAPS, TRANSFORMS, pooled, twice
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.test_flurka import inputs as summarised
from tests.kernels.triton.test_squared import OFFSET, inputs

C = 16
OPTIONS = {"block_size": C, "scale": 1 / 16, "backend": "triton", **OFFSET}


def leaves(t, dtype=torch.float32, made=inputs, **shape):
    return {name: x.to(DEVICE).to(dtype).requires_grad_() for name, x in made(t, **shape).items()}


def outcome(attention, given, **options):
    """Output, final state, and the gradients of both in all that is given."""
    o, state = attention(**given, **OPTIONS, **options)
    loss = o.square().sum() if state is None else o.square().sum() + state.S.square().sum()
    gradients = torch.autograd.grad(loss, list(given.values()))
    return [o.detach(), *([] if state is None else [state.S.detach()]), *gradients]


def same(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def packed(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    "shape, options",
    [
        ({"gated": True, "r": 20}, {"local_blocks": 2, "output_final_state": True}),
        ({"with_qk": False, "b": 2}, {}),
        ({}, {"cu_seqlens": packed(C + 3, C + 9)}),
    ],
    ids=str,
)
def test_compiled_in_one_graph(shape, options):
    compiled = torch.compile(squared_attention, fullgraph=True, backend="aot_eager")
    given = leaves(C + 9, **shape)
    same(outcome(compiled, given, **options), outcome(squared_attention, given, **options))


@pytest.mark.parametrize("documents", [False, True])
def test_lengths_share_one_graph(documents):
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(squared_attention, fullgraph=True, backend=count)
    for t in (C + 1, C + 2, C + 7, 2 * C + 3)[documents:]:
        given, options = leaves(t), {"cu_seqlens": packed(5, t)} if documents else {}
        same(outcome(compiled, given, **options), outcome(squared_attention, given, **options))
    assert count.frame_count == 2  # for the first length, and for any


@pytest.mark.parametrize(
    "attention, given, final",
    [
        (squared_attention, leaves(C + 3, gated=True, r=20), True),
        (squared_attention, leaves(C + 3, torch.bfloat16, with_qk=False), False),
        (flurka_attention, leaves(C + 3, made=summarised, gated=True, massive=True), False),
    ],
    ids=["squared", "squared without q, k", "flurka"],
)
def test_what_the_operators_say_of_themselves(attention, given, final):
    """Shapes, strides and dtypes without computing, derivatives, no change of what is given: PyTorch's own checks."""
    from lcpt_kernels.triton.block_causal import autograd  # noqa: F401, which defines them

    calls = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("block_causal_attention", "block_causal_attention_backward"):
            operator = getattr(torch.ops.lcpt_kernels, name)

            def note(*arguments, operator=operator):
                calls[operator] = arguments
                return operator(*arguments)

            patch.setattr(torch.ops.lcpt_kernels, name, note)
        options = {"block_size": C, "backend": "triton", **OFFSET}
        o, _ = attention(**given, **options, output_final_state=final)
        o.sum().backward()
    forward, backward = calls
    torch.library.opcheck(forward.default, calls[forward])
    without_graph = [x.detach() if isinstance(x, torch.Tensor) else x for x in calls[backward]]
    torch.library.opcheck(backward.default, without_graph)


def test_what_the_passes_of_an_exchange_say_of_themselves():
    """As above, without the derivatives, which test_pieces.py compares."""
    from lcpt_kernels.triton.block_causal import compute  # noqa: F401, which defines them

    calls = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("block_causal_state", "block_causal_attention"):
            for operator in (getattr(torch.ops.lcpt_kernels, f"{name}{end}") for end in ("", "_backward")):

                def note(*arguments, operator=operator):
                    calls[operator] = arguments
                    return operator(*arguments)

                patch.setattr(torch.ops.lcpt_kernels, operator._qualified_op_name.split("::")[1], note)
        given = leaves(C + 3, torch.bfloat16, with_qk=False, gated=True)
        squared_attention(**given, exchange=Ranks([0]), **OPTIONS)[0].sum().backward()
    assert len(calls) == 4
    for operator, found in calls.items():
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in found]
        torch.library.opcheck(operator.default, detached, test_utils=("test_schema", "test_faketensor"))


def test_checkpointed():
    given = leaves(C + 9, gated=True)

    def again(**arguments):
        return checkpoint(squared_attention, **arguments, use_reentrant=False)

    same(outcome(again, given), outcome(squared_attention, given))


def test_under_autocast():
    """fp32 arguments are taken in bf16, but for the gate; a module around gets gradients in fp32."""
    given = leaves(C + 9, gated=True)
    lower = {name: x if name == "log_gate" else x.detach().bfloat16().requires_grad_() for name, x in given.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        found = outcome(squared_attention, given)
    expected = outcome(squared_attention, lower)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    same(found, [expected[0], *(x.float() for x in expected[1:])])


@pytest.mark.parametrize(
    "name",
    ["squared", "sparse", "elu1", "learned_sketch", "norm_rotary", "norm_rotary, key shift", "pool_blocks"],
)
def test_one_derivative_and_no_transforms(name):
    """One of each operator's."""
    function = (ATTENTIONS | MAPS | {"pool_blocks": pooled})[name]
    x = torch.rand(1, 5, 2, 4, device=DEVICE, requires_grad=True)
    gradient, no_second = twice(function, x, backend="triton")
    with pytest.raises(ValueError, match="has no second derivative, backend (reference|torch) has"):
        no_second()
    for transform in TRANSFORMS.values():
        with pytest.raises(ValueError, match="no torch.func transform .* backend (reference|torch) does"):
            transform(lambda y: function(y, backend="triton"), x.detach())


@pytest.mark.parametrize("attention, made", [(squared_attention, inputs), (flurka_attention, summarised)])
def test_no_sequences(attention, made):
    given = leaves(C + 9, made=made, b=0, gated=True)
    o, state, *gradients = outcome(attention, given, output_final_state=True)
    assert o.shape == (0, C + 9, 1, 16) and state.shape[0] == 0
    assert all(x.shape == dx.shape for x, dx in zip(given.values(), gradients, strict=True))


@pytest.mark.parametrize("ends", [(C, C + 8), (C + 3, C, C + 9)])
def test_packed_documents_that_do_not_fit_are_noticed_where_nobody_waits(ends):
    compiled = torch.compile(squared_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to T"):
        compiled(**leaves(C + 9), **OPTIONS, cu_seqlens=packed(*ends))


def test_arguments_have_one_order():
    """The schemas of both operators are those of Call, and unflatten is the inverse of flatten."""
    from lcpt_kernels.triton.block_causal import autograd as block_causal
    from lcpt_kernels.triton.interval import autograd as interval

    for module, name in ((block_causal, "block_causal_attention"), (interval, "interval_attention")):
        arguments = tuple(range(len(module.FIELDS)))
        assert tuple(module.flatten(module.unflatten(arguments))) == arguments
        schema = getattr(torch.ops.lcpt_kernels, name).default._schema
        assert [argument.name for argument in schema.arguments] == module.FIELDS
        backward = getattr(torch.ops.lcpt_kernels, f"{name}_backward").default._schema
        assert [argument.name for argument in backward.arguments][-len(module.FIELDS) :] == module.FIELDS
