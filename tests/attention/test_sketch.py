import pytest
import torch

from lcpt.attention.sketch import DRAW, LearnedSketch, LinearProductsSketch, LinearSketch, RandomSketch, srht

SCALE = 1 / 8  # 1/d of most tests


@pytest.mark.parametrize("scale, shift", [(SCALE, 0.0), (0.1, 1.0), (0.1, 0.5)])
@pytest.mark.parametrize("kind", DRAW)
def test_random_sketches_mean_the_square_of_the_shifted_product(kind, scale, shift):
    """E[S(q)·S(k)] = (scale·q·k + shift)² over the draw: a factor √r or √d too much or too little is far outside."""
    torch.manual_seed(0)
    d, r = 8, 16
    q, noise = torch.randn(2, d)
    k = q + 0.3 * noise
    sketches = (RandomSketch(d, r, kind, scale, shift) for _ in range(4_000))
    found = torch.stack([sketch(q) @ sketch(k) for sketch in sketches])
    expected = (scale * (q @ k) + shift) ** 2
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - expected) < 4 * error and error < 0.05 * expected


@pytest.mark.parametrize("kind", DRAW)
def test_random_sketches_are_of_degree_two(kind):
    sketch, x = RandomSketch(8, 16, kind, SCALE), torch.randn(3, 8)
    torch.testing.assert_close(sketch(3 * x), 9 * sketch(x))


def test_gaussian_error_falls_with_size():
    """The standard deviation of S(q)·S(k) is that of one product over √r."""
    torch.manual_seed(0)
    q = torch.randn(8)

    def spread(r):
        sketches = (RandomSketch(8, r, "gaussian", SCALE) for _ in range(2_000))
        return torch.stack([sketch(q) @ sketch(q) for sketch in sketches]).std()

    assert 3.2 < spread(4) / spread(64) < 5  # √16


def test_far_weights_are_not_negative():
    """(S(q)·S(k))² is a weight whatever the sketch; S(q)·S(k) alone is not."""
    torch.manual_seed(0)
    sketches = (
        RandomSketch(8, 4, "gaussian", SCALE),
        RandomSketch(8, 4, "srht", SCALE),
        LearnedSketch(8, 4, 2, 1),
        LinearSketch(1, 8, 4, 0.5, 1.0),
        LinearProductsSketch(1, 8, 4, 2, 1, 0.5, 1.0),
    )
    for sketch in sketches:
        q, k = torch.randn(2, 1, 50, 1, 8)
        products = sketch(q)[0, :, 0] @ sketch(k)[0, :, 0].T
        assert products.min() < 0 <= products.square().min()


def test_random_sketches_travel_with_the_weights():
    first, second = (RandomSketch(8, 4, "srht", SCALE, 1.0) for _ in range(2))
    x = torch.randn(3, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x)) and not list(first.parameters())


@pytest.mark.parametrize("levels", [1, 2])
def test_learned_sketch_is_bounded(levels):
    """|S| ≤ 1 in every coordinate, so |S(q)·S(k)| ≤ r, at any norm; and it is not saturated at the start."""
    torch.manual_seed(0)
    sketch = LearnedSketch(16, 8, 2, levels)
    x = torch.randn(200, 16)
    assert (sketch(1000 * x) @ sketch(1000 * x).T).abs().max() <= 8
    assert sketch(1000 * x).abs().max() > 0.99
    assert (0.01 if levels == 1 else 0.001) < sketch(x).abs().mean() < 0.8


def test_a_linear_sketch_has_the_slope_of_the_power_it_stands_for():
    """S(q)·S(k) = shift² + Pq·Pk; where P keeps all of d coordinates, Pq·Pk = 2·shift·scale·q·k."""
    d, scale, shift = 8, 0.1, 0.5
    q, k = torch.randn(2, 1, 5, 2, d)
    sketch = LinearSketch(2, d, d + 1, scale, shift)
    found = (sketch(q) * sketch(k)).sum(-1)
    torch.testing.assert_close(found, shift**2 + 2 * shift * scale * (q * k).sum(-1))
    half = LinearSketch(2, d, d // 2 + 1, scale, shift)  # keeps the slowest pairs, at twice the slope
    slow = [i for pair in (2, 3) for i in (pair, pair + d // 2)]
    found = (half(q) * half(k)).sum(-1)
    torch.testing.assert_close(found, shift**2 + 4 * shift * scale * (q * k)[..., slow].sum(-1))
    wide = LinearSketch(2, d, d + 4, scale, shift)  # more features than coordinates
    torch.testing.assert_close((wide(q) * wide(k)).sum(-1), (sketch(q) * sketch(k)).sum(-1))


def test_a_linear_sketch_has_a_matrix_of_each_key_head():
    sketch, x = LinearSketch(2, 8, 4, SCALE, 1.0), torch.randn(1, 3, 4, 8)
    with torch.no_grad():
        sketch.P[1] += 1
        alike = sketch(x)[0, :, :2], LinearSketch(2, 8, 4, SCALE, 1.0)(x)[0, :, :2]
    assert torch.equal(*alike)  # query heads 0 and 1 use key head 0
    assert not torch.allclose(sketch(x)[0, :, 2:], LinearSketch(2, 8, 4, SCALE, 1.0)(x)[0, :, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_factor_of_each_head_multiplies_a_linear_sketch(dtype):
    """And the constant is then rounded once."""
    torch.manual_seed(0)
    sketch, x = LinearSketch(2, 8, 5, SCALE, 0.7), torch.randn(2, 3, 6, 8).to(dtype)
    factor = torch.rand(6, requires_grad=True)
    found, plain = sketch(x, factor), sketch(x.float())
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), factor[:, None] * plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(found[0, 0, :, 0], (0.7 * factor).to(dtype))
    assert (sketch(x)[..., 0] == torch.tensor(0.7).to(dtype)).all()


def test_a_factor_of_each_head_has_exact_gradients():
    torch.manual_seed(0)
    sketch, x = LinearSketch(2, 8, 5, SCALE, 0.7).double(), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    factor, do = torch.rand(6, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    wanted = [x.requires_grad_(), sketch.P, factor]
    found = torch.autograd.grad(sketch(x, factor), wanted, do)
    expected = torch.autograd.grad(factor[:, None] * sketch(x), wanted, do)
    torch.testing.assert_close(found, expected)


def test_the_constant_is_no_weight_of_a_linear_sketch():
    """Checkpoints hold P alone."""
    weights = LinearSketch(2, 8, 5, SCALE, 1.0).state_dict()
    assert {name: list(x.shape) for name, x in weights.items()} == {"P": [2, 8, 4]}


def test_products_start_at_nothing_and_learn():
    torch.manual_seed(0)
    sketch, x = LinearProductsSketch(2, 8, 4, 2, 1, SCALE, 1.0), torch.randn(1, 3, 4, 8)
    assert torch.equal(sketch(x), sketch.linear(x))
    sketch(x).square().sum().backward()
    assert sketch.gain.grad.abs().min() > 0
    with torch.no_grad():
        sketch.gain.fill_(0.5)
    torch.testing.assert_close(sketch(x)[..., 1:], sketch.linear(x)[..., 1:] + 0.5 * sketch.products(x))
    assert (sketch(x)[..., 0] == 1).all()


def test_a_learned_sketch_with_a_shift_begins_with_it():
    sketch = LearnedSketch(8, 4, 2, 1, shift=0.5)
    y = sketch(torch.randn(1, 3, 2, 8))
    assert y.shape == (1, 3, 2, 4) and (y[..., 0] == 0.5).all() and sketch.down[0].shape == (2, 6, 3)


def test_flops_are_those_of_the_matrices():
    assert RandomSketch(8, 4, "gaussian", SCALE, shift=1.0).flops() == 2 * 2 * 8 * 4
    assert LinearSketch(2, 8, 4, SCALE, 1.0).flops() == 2 * 8 * 3
    products = 2 * 2 * (8 * 9 + 9 * 3)
    assert LinearProductsSketch(2, 8, 4, 3, 1, SCALE, 1.0).flops() == 2 * 8 * 3 + products
    assert LearnedSketch(8, 4, 3, 1).flops() == 2 * 2 * (8 * 12 + 12 * 4)
    assert LearnedSketch(8, 4, 3, 2).flops() == 2 * 2 * (8 * 12 + 12 * 4 + 4 * 12 + 12 * 4)


@pytest.mark.parametrize("rows", [8, 12])
def test_srht_is_made_of_a_hadamard_matrix(rows):
    """Entries ±1; columns are equal or, where no row is cut off, orthogonal; signs differ from row to row."""
    torch.manual_seed(0)
    G = srht(rows, 200)
    assert set(G.unique().tolist()) == {-1.0, 1.0}
    if rows == 8:
        assert set((G.T @ G).unique().tolist()) == {0.0, 8.0}
        assert len(G.unique(dim=1).T) == 8
    assert len({tuple(srht(rows, 1)[:, 0].tolist()) for _ in range(20)}) > 10
