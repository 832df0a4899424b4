"""What no function takes, and what has no second derivative: one line that says so, the same for all of them."""

import pytest
import torch
from lcpt_kernels import (
    feature_attention,
    feature_maps,
    flurka_attention,
    lowrank_attention,
    polynomial_attention,
    sparse_attention,
    squared_attention,
)
from lcpt_kernels.learned_sketch import learned_sketch
from lcpt_kernels.norm_rotary import norm_rotary
from lcpt_kernels.pooling import pool_blocks


def rand(*size):
    return torch.rand(*size)


def flurka(q, **options):
    summaries = rand(q.shape[0], q.shape[1] // 2, *q.shape[2:]).to(q.dtype)
    return flurka_attention(q, q, q, q, summaries, summaries, block_size=2, **options)[0]


def lowrank(q, **options):
    summaries = rand(q.shape[0], q.shape[1] // 2, *q.shape[2:]).to(q.dtype)
    return lowrank_attention(q, q, q, q, summaries, summaries, summaries=1, block_size=2, **options)


def rotated(x, **options):
    return norm_rotary(x, rand(4), rand(4), rand(x.shape[1], 1, 2), rand(x.shape[1], 1, 2), **options)[0]


ATTENTIONS = {
    "squared": lambda q, **o: squared_attention(q, q, q, q=q, k=q, block_size=2, **o)[0],
    "feature": lambda q, **o: feature_attention(q, q, q, block_size=2, **o)[0],
    "flurka": flurka,
    "lowrank": lowrank,
    "polynomial": lambda q, **o: polynomial_attention(q, q, q, **o),
    "sparse": lambda q, **o: sparse_attention(q, q, q, window=2, **o),
}
MAPS = {
    "elu1": feature_maps.elu1,
    "relu": lambda x, **o: feature_maps.relu(x, rand(2, 4, 6), rand(2, 6), **o),
    "favor": lambda x, **o: feature_maps.favor(x, rand(2, 4, 6), **o),
    "hedgehog": lambda x, **o: feature_maps.hedgehog(x, rand(2, 4, 6), **o),
    "oglu": lambda x, **o: feature_maps.oglu(x, rand(2, 4, 6), rand(2, 4, 6), **o),
    "learned_sketch": lambda x, **o: learned_sketch(x, [rand(2, 4, 8)], [rand(2, 8, 4)], **o),
    "norm_rotary": rotated,
    "norm_rotary, key shift": lambda x, **o: rotated(x, key_shift=rand(2, 4), **o),
}


def pooled(k, **options):
    """k [B, N, Hkv, D], each token twice a block."""
    blocks = torch.stack((k, k), dim=2)
    return pool_blocks(blocks, blocks, logits=rand(2, k.shape[2], 3), segments=rand(2, 1, 3), **options)[0]


@pytest.mark.parametrize("shape", [(1, 5, 0, 4), (1, 5, 2, 0)], ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_attention_of_no_heads_is_named(name, backend, shape):
    with pytest.raises(ValueError, match="at least 1") as caught:
        ATTENTIONS[name](torch.zeros(shape), backend=backend)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize(
    "function", [feature_attention, polynomial_attention, squared_attention], ids=lambda f: f.__name__
)
def test_heads_before_tokens_are_named_where_they_show(function):
    """Fewer heads of keys show it, also where tokens come first and disagree for another reason: no hint then."""
    q, k = rand(1, 4, 9, 5), rand(1, 2, 9, 5)
    with pytest.raises(ValueError, match=r"disagree on \[B, T\].*fit as \[B, H, T, D\]: give x.transpose\(1, 2\)"):
        function(q, k, k)
    with pytest.raises(ValueError, match=r"disagree on \[B, T\]") as caught:
        function(q, k, rand(1, 3, 9, 5))
    assert "transpose" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 5, 0, 4), (1, 5, 2, 0)], ids=str)
@pytest.mark.parametrize("name", [*MAPS, "pool_blocks"])
def test_a_map_of_no_heads_is_named(name, shape):
    with pytest.raises(ValueError, match="at least 1"):
        (MAPS | {"pool_blocks": pooled})[name](torch.zeros(shape))


def empty(function, shape, **options):
    x = torch.zeros(shape, requires_grad=True)
    y = function(x, **options)
    assert y.numel() == 0 and y.shape[:1] + y.shape[2:3] == x.shape[:1] + x.shape[2:3]
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attention_of_no_sequences_is_empty(name, backend):
    empty(ATTENTIONS[name], (0, 5, 2, 4), backend=backend)


def test_sparse_attention_of_no_buckets_is_empty():
    bucket = torch.zeros(0, 5, 2, dtype=torch.int64)
    empty(lambda q: sparse_attention(q, q, q, q_bucket=bucket, k_bucket=bucket), (0, 5, 2, 4))


@pytest.mark.parametrize("name", [*MAPS, "pool_blocks"])
@pytest.mark.parametrize("shape", [(2, 0, 2, 4), (0, 5, 2, 4)], ids=str)
def test_a_map_of_no_tokens_is_empty(name, shape):
    empty((MAPS | {"pool_blocks": pooled})[name], shape)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "cu_seqlens, named",
    [
        ([0, 5], "a list"),
        (torch.tensor([0.0, 5.0]), "torch.float32"),
        (torch.tensor([0, 5], dtype=torch.int16), "int16"),
    ],
    ids=["list", "float", "int16"],
)
def test_ends_of_documents_are_integers(name, backend, cu_seqlens, named):
    with pytest.raises(ValueError, match="cu_seqlens is .*int32 or") as caught:
        ATTENTIONS[name](rand(1, 5, 2, 4), backend=backend, cu_seqlens=cu_seqlens)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def loss(function, **options):
    def of(x):
        torch.manual_seed(0)
        return function(x, **options).square().sum()

    return of


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(loss(function))(x),
    "vmap": lambda function, x: torch.func.vmap(function, randomness="same")(torch.stack((x, x))),
    "jvp": lambda function, x: torch.func.jvp(loss(function), (x,), (x,)),
}


def twice(function, x, **options):
    """The gradient of the gradient's square."""
    (gradient,) = torch.autograd.grad(loss(function, **options)(x), x, create_graph=True)
    return gradient, lambda: torch.autograd.grad(gradient.square().sum(), x)[0]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_derivative(name):
    """The reference has a second one; what has not says so, but not before it is asked for."""
    x = rand(1, 5, 2, 4).double().requires_grad_()
    expected, second = twice(ATTENTIONS[name], x, backend="reference")
    gradient, no_second = twice(ATTENTIONS[name], x, backend="torch")
    torch.testing.assert_close(gradient, expected)
    if name in ("lowrank", "sparse"):  # whose backward passes are differentiable
        torch.testing.assert_close(no_second(), second())
        return
    assert second().isfinite().all()
    with pytest.raises(ValueError, match="no second derivative, backend reference has"):
        no_second()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_transforms_are_for_the_reference(name, transform):
    x = rand(1, 5, 2, 4)
    TRANSFORMS[transform](lambda y: ATTENTIONS[name](y, backend="reference"), x)
    with pytest.raises(ValueError, match="no torch.func transform .* backend reference does") as caught:
        TRANSFORMS[transform](lambda y: ATTENTIONS[name](y, backend="torch"), x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [*MAPS, "pool_blocks"])
def test_maps_in_pytorch_take_transforms(name, transform):
    TRANSFORMS[transform](lambda y: (MAPS | {"pool_blocks": pooled})[name](y, backend="torch"), rand(1, 5, 2, 4))
