"""What is drawn from a model: by temperature, top-k and top-p, in rows that do not depend on each other."""

import itertools

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.model import GPT, ModelConfig, generation
from lcpt.model.generation import Sampling, choose, generate, read, weights


def build(*pattern):
    torch.manual_seed(0)
    attention = AttentionConfig(pattern=list(pattern), block_size=4)
    return GPT(ModelConfig(n_layers=2, d_model=32, n_heads=4, vocab_size=50, attention=attention)).double()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def first(count, *arguments):
    """[N, count]: the first tokens of each continuation."""
    return torch.stack(list(itertools.islice(generate(*arguments), count)), dim=1)


def test_temperature_0_takes_the_likeliest_token():
    model, tokens = build("polysketch", "softmax"), torch.randint(50, (2, 5))
    new = first(8, model, tokens, Sampling(0), [None, None])
    whole = torch.cat((tokens, new), dim=1)
    assert torch.equal(new, model(whole)[:, 4:-1].argmax(-1))


def test_draws_follow_the_temperature():
    logits, (generator,) = torch.tensor([0.0, 1.0, 2.0]), generators(0)
    for temperature in (0.5, 1.0, 3.0):
        draws = torch.stack([choose(logits, Sampling(temperature), generator) for _ in range(4000)])
        shares = torch.bincount(draws, minlength=3) / 4000
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), rtol=0, atol=0.03)


def plain_weights(logits, temperature, top_k, top_p):
    """The same in float64, token by token."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])[:top_k]
    kept, total, before = torch.zeros(len(p), dtype=torch.float64), sum(p[token] for token in order), 0.0
    for token in order:
        if top_p is None or before < top_p * total or before == 0:
            kept[token] = p[token]
        before += p[token]
    return kept


@pytest.mark.parametrize("top_p", [None, 1e-60, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 50, 10**30])
def test_top_k_and_top_p(top_k, top_p):
    for temperature in (0.3, 1.0, 2.0):
        logits = 3 * torch.randn(50)
        found = weights(logits, Sampling(temperature, top_k, top_p))
        expected = plain_weights(logits, temperature, top_k and min(top_k, 50), top_p)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
        if top_p != 1:  # whose rounded sum may leave out the last
            assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("temperature", [1e-30, 1e300])
def test_any_temperature_gives_weights(temperature):
    found = weights(torch.tensor([3e4, -3e4, 2e4]), Sampling(temperature))
    assert found.tolist() == ([1, 0, 0] if temperature < 1 else pytest.approx([1 / 3] * 3))


def test_what_fp32_cannot_divide_by_takes_the_likeliest():
    assert choose(torch.tensor([1.0, 3.0, 2.0]), Sampling(1e-40), None) == 1


def test_ties_do_not_widen_top_k():
    assert weights(torch.zeros(6), Sampling(1.0, top_k=2)).count_nonzero() == 2


@pytest.mark.parametrize("pattern", [("kernel",), ("softmax", "polysketch")], ids=",".join)
def test_a_sample_depends_on_its_generator_alone(pattern):
    model, prompt = build(*pattern), torch.randint(50, (1, 5))
    many = first(12, model, prompt, Sampling(1.0), generators(3, 1, 4))
    assert len({tuple(row) for row in many.tolist()}) == 3
    for row, seed in zip(many, (3, 1, 4), strict=True):
        assert torch.equal(row, first(12, model, prompt, Sampling(1.0), generators(seed))[0])


def test_rows_of_a_batch_are_continued_as_if_alone():
    model, tokens = build("polysketch"), torch.randint(50, (3, 5))
    rows = first(9, model, tokens, Sampling(1.0, top_p=0.9), generators(1, 1, 2))
    for row, alone, seed in zip(rows, tokens, (1, 1, 2), strict=True):
        assert torch.equal(row, first(9, model, alone[None], Sampling(1.0, top_p=0.9), generators(seed))[0])


@pytest.mark.parametrize("pattern", [("kernel",), ("softmax", "polysketch"), ("lowrank", "flurka")], ids=",".join)
@pytest.mark.parametrize("piece", [1, 5, 8, 23])
def test_a_prompt_is_read_in_pieces(pattern, piece, monkeypatch):
    model, tokens, lengths = build(*pattern), torch.randint(50, (2, 23)), []
    monkeypatch.setattr(generation, "PIECE", piece)
    extend = model.extend
    monkeypatch.setattr(model, "extend", lambda x, cache=None: lengths.append(x.shape[1]) or extend(x, cache))
    logits, cache = read(model, tokens)
    assert cache.position == sum(lengths) == 23 and max(lengths) == piece
    torch.testing.assert_close(logits, model(tokens)[:, -1], rtol=1e-9, atol=1e-9)
    following = torch.randint(50, (2,))
    expected = model(torch.cat((tokens, following[:, None]), dim=1))[:, -1]
    torch.testing.assert_close(model.decode(following, cache)[0], expected, rtol=1e-9, atol=1e-9)


def test_the_method_draws_as_the_function():
    model, tokens = build("kernel"), torch.randint(50, (2, 5))
    found = model.generate(tokens, 7, temperature=0.7, top_k=20, top_p=0.9, generator=generators(5)[0])
    (shared,) = generators(5)
    assert found.shape == (2, 7) and found.dtype == torch.int64
    assert torch.equal(found, first(7, model, tokens, Sampling(0.7, 20, 0.9), [shared, shared]))


@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "BOS"),
    ],
)
def test_bad_arguments_are_named(arguments, part):
    with pytest.raises(ValueError, match=part):
        build("kernel").generate(**{"tokens": torch.zeros(1, 3, dtype=torch.int64), "max_tokens": 2} | arguments)


def test_broken_weights_are_named():
    model = build("kernel")
    torch.nn.init.constant_(model.embedding.weight, float("nan"))
    with pytest.raises(ValueError, match="logits after 3 tokens are not finite"):
        model.generate(torch.zeros(1, 3, dtype=torch.int64), 2, temperature=0)
