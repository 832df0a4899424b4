import math

import pytest
import torch
from lcpt_kernels.feature_maps import per_head

from lcpt.attention.feature_maps import FEATURE_MAPS, Favor, Hedgehog, Relu, check_feature_map, orthogonal_rows


@pytest.mark.parametrize("name", [name for name in FEATURE_MAPS if "sketch" not in name])
@pytest.mark.parametrize("heads", [2, 6])
def test_shape_sign_and_heads(name, heads):
    """Positive, [.., m], and each query head uses the matrix of its own key-value head."""
    torch.manual_seed(0)
    phi, x = FEATURE_MAPS[name](2, 8, 12 if name in ("relu", "favor") else None), torch.randn(3, 5, heads, 8)
    y = phi(x, False)
    assert y.shape == (3, 5, heads, phi.size) and (y >= 0).all() and y.isfinite().all()
    group, state = heads // 2, phi.state_dict()
    for head in range(heads):
        single = FEATURE_MAPS[name](1, 8, 12 if name in ("relu", "favor") else None)
        single.load_state_dict({n: w[head // group :][:1] for n, w in state.items()})
        torch.testing.assert_close(single(x[:, :, head : head + 1], False), y[:, :, head : head + 1])


def test_per_head_by_hand():
    x, W = torch.randn(2, 3, 4, 5), torch.randn(2, 5, 6)
    for head in range(4):
        torch.testing.assert_close(per_head(x, W)[:, :, head], x[:, :, head] @ W[head // 2])


def test_orthogonal_rows():
    """Orthogonal within a block, with the lengths of Gaussian vectors."""
    torch.manual_seed(0)
    rows = orthogonal_rows(3 * 64 + 5, 64)
    assert rows.shape == (197, 64)
    for start in (0, 64, 128):
        block = torch.nn.functional.normalize(rows[start : start + 64], dim=1)
        torch.testing.assert_close(block @ block.T, torch.eye(64), rtol=0, atol=1e-5)
    assert rows.norm(dim=1).mean() == pytest.approx(8.0, rel=0.03) and 0.5 < rows.norm(dim=1).std() < 0.9


def test_favor_estimates_the_exponential():
    """E[φ(q)·φ(k)] = exp(q·k/√d), but for the factor that is subtracted from each query's exponents."""
    torch.manual_seed(0)
    phi, d = Favor(1, 16, 16 * 2000), 16
    q, k = 0.6 * torch.randn(1, 8, 1, d), 0.6 * torch.randn(1, 8, 1, d)
    estimate = torch.einsum("bthm,bshm->ts", phi(q, False), phi(k, False))
    exact = torch.exp(torch.einsum("bthd,bshd->ts", q, k) / math.sqrt(d))
    assert ((estimate - exact).norm() / exact.norm()) < 0.05
    stabilised = torch.einsum("bthm,bshm->ts", phi(q, True), phi(k, False))
    ratio = stabilised / estimate
    assert (ratio.std(dim=1) / ratio.mean(dim=1)).max() < 0.02


def test_favor_of_large_vectors_is_finite():
    phi = Favor(1, 64, None)
    for is_query in (True, False):
        y = phi(4 * math.sqrt(64) * torch.nn.functional.normalize(torch.randn(1, 50, 1, 64), dim=-1), is_query)
        assert y.isfinite().all()


def test_hedgehog_begins_with_the_identity():
    x = torch.randn(1, 3, 1, 4)
    expected = torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1)
    torch.testing.assert_close(Hedgehog(1, 4, None)(x, True), expected)


def test_relu_has_a_bias():
    phi = Relu(1, 4, None)
    with torch.no_grad():
        phi.b.fill_(100.0)
    assert phi(torch.randn(1, 3, 1, 4), True).min() > 50


@pytest.mark.parametrize("name", ["sketch", "linear_sketch"])
def test_sketch_features_are_a_square(name):
    """φ(q)·φ(k) = (S(q)·S(k))²: never negative, though the features are."""
    torch.manual_seed(0)
    phi, x = FEATURE_MAPS[name](2, 8, 16), torch.randn(3, 5, 4, 8)
    y, S = phi(x, True), phi.sketch(x)
    assert y.shape[-1] == phi.size == 16 and S.shape[-1] == 4
    torch.testing.assert_close(torch.einsum("bthm,bshm->bths", y, y), torch.einsum("bthm,bshm->bths", S, S).square())


@pytest.mark.parametrize(
    "name, size, part",
    [
        ("cosine", None, "'cosine'"),
        ("affine", None, "'affine'"),
        ("relu", 0, "size is 0"),
        ("sketch", 60, "square"),
        ("linear_sketch", 1, "square ≥ 4"),
    ],
)
def test_what_no_map_can_be_is_named(name, size, part):
    with pytest.raises(ValueError, match="model.attention.kernel") as caught:
        check_feature_map("kernel", name, size)
    assert part in str(caught.value)
