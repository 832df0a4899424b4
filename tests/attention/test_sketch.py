import pytest
import torch

from lcpt.attention.sketch import DRAW, LearnedSketch, RandomSketch, srht


@pytest.mark.parametrize("kind", DRAW)
def test_random_sketches_mean_the_square_of_the_mean_product(kind):
    """E[S(q)·S(k)] = (q·k/d)² over the draw of the sketch: a factor √r or √d too much or too little is far outside."""
    torch.manual_seed(0)
    d, r = 8, 16
    q, noise = torch.randn(2, d)
    k = q + 0.3 * noise
    found = torch.stack([sketch(q) @ sketch(k) for sketch in (RandomSketch(d, r, kind) for _ in range(4_000))])
    expected = (q @ k / d) ** 2
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - expected) < 4 * error and error < 0.05 * expected


@pytest.mark.parametrize("kind", DRAW)
def test_random_sketches_are_of_degree_two(kind):
    sketch, x = RandomSketch(8, 16, kind), torch.randn(3, 8)
    torch.testing.assert_close(sketch(3 * x), 9 * sketch(x))


def test_gaussian_error_falls_with_size():
    """The standard deviation of S(q)·S(k) is that of one product over √r."""
    torch.manual_seed(0)
    q = torch.randn(8)

    def spread(r):
        sketches = (RandomSketch(8, r, "gaussian") for _ in range(2_000))
        return torch.stack([sketch(q) @ sketch(q) for sketch in sketches]).std()

    assert 3.2 < spread(4) / spread(64) < 5  # √16


def test_far_weights_are_not_negative():
    """(S(q)·S(k))² is a weight whatever the sketch; S(q)·S(k) alone is not."""
    torch.manual_seed(0)
    for sketch in (RandomSketch(8, 4, "gaussian"), RandomSketch(8, 4, "srht"), LearnedSketch(8, 4, 2, 1)):
        products = sketch(torch.randn(50, 8)) @ sketch(torch.randn(50, 8)).T
        assert products.min() < 0 <= products.square().min()


def test_random_sketches_travel_with_the_weights():
    first, second = RandomSketch(8, 4, "srht"), RandomSketch(8, 4, "srht")
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


def test_flops_are_those_of_the_matrices():
    assert RandomSketch(8, 4, "gaussian").flops() == 2 * 2 * 8 * 4
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
