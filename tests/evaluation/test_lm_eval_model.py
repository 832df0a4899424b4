"""The model that lm-evaluation-harness sees, against float64 sums over windows that are cut here."""

import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install lcpt[eval]")

from lm_eval.api.registry import get_model

from lcpt.attention import AttentionConfig
from lcpt.data import Tokenizer
from lcpt.evaluation import lm_eval_model
from lcpt.evaluation.lm_eval_model import LcptLM, likeliest
from lcpt.evaluation.scoring import score
from lcpt.evaluation.windows import Window
from lcpt.model import GPT, ModelConfig
from lcpt.model.pretrained import Pretrained, open_pretrained, write_pretrained

CONTEXT = 24
TEXT = "The river saw a green bird under the old house. Never quickly, é 日本 12 345!\n"


@pytest.fixture(scope="module")
def export(train_folder, tmp_path_factory):
    torch.manual_seed(0)
    attention = AttentionConfig(pattern=["polysketch", "softmax"], block_size=16)
    model = GPT(ModelConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=330, attention=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 4  # losses that differ from token to token
    folder = tmp_path_factory.mktemp("export") / "export"
    trained = Pretrained(
        folder=folder, model=model, tokenizer=train_folder / "tokenizer.model", context=CONTEXT, step=1, tokens=1
    )
    write_pretrained(trained, folder)
    return folder


@pytest.fixture(scope="module")
def exact(export):
    """exact(tokens) -> log p of each token after the first, float64 [T - 1, V]."""
    model = open_pretrained(export).model.double()

    def log_p(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1).numpy()

    return log_p


@pytest.fixture
def lm(export, monkeypatch):
    """The model, without a network."""

    def refuse(*_, **__):
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return LcptLM(str(export), batch_size=3, device="cpu")


def ask(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def encode(lm, text):
    return [lm.tokenizer_of_text.bos_id, *lm.tokenizer_of_text.encode(text)]


def filled_windows(tokens, context):
    """Yield (inputs + label, first scored label) of windows of which the last is moved back to be whole."""
    labels = len(tokens) - 1
    for begin in range(0, labels, context):
        end = min(begin + context, labels)
        start = max(0, end - context)
        yield tokens[start : end + 1], begin - start


def reference(lm, exact, text):
    nats = 0.0
    for tokens, first in filled_windows(encode(lm, text), lm.max_length):
        rows = exact(tokens)
        nats += sum(rows[n, tokens[n + 1]] for n in range(first, len(rows)))
    return nats


def test_the_harness_finds_it_by_name():
    assert get_model("lcpt") is LcptLM


@pytest.mark.parametrize("context", [3, 7, CONTEXT, 4096])
def test_rolling_sums_are_those_of_windows_of_which_the_last_is_whole(export, exact, context):
    """Texts of many lengths: shorter than a window, one token beyond it, many windows and a rest."""
    lm = LcptLM(str(export), context=context, batch_size=4, device="cpu")
    texts = [TEXT * 3, "The", TEXT[:30], TEXT, "", TEXT * 2 + "a"]
    got = lm.loglikelihood_rolling(ask(*((text,) for text in texts)), disable_tqdm=True)
    expected = [reference(lm, exact, text) for text in texts]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
    assert got[4] == 0


def test_rolling_sums_are_those_of_score_on_the_same_windows(lm):
    """The loss of tools/evaluate.py, but for how the last window is cut."""
    texts = [TEXT * 3, TEXT[:30]]
    windows = []
    for number, text in enumerate(texts):
        for tokens, first in filled_windows(encode(lm, text), CONTEXT):
            labels = np.array(tokens[1:])
            labels[:first] = -1
            windows.append(Window(number, np.array(tokens[:-1]), labels))
    expected = np.zeros(2)
    for window, losses in score(lm.model, windows, 1, torch.device("cpu")):
        expected[window.document] -= losses.sum(dtype=np.float64)
    got = lm.loglikelihood_rolling(ask(*((text,) for text in texts)), disable_tqdm=True)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    short = [window._replace(inputs=window.inputs[-5:], labels=window.labels[-5:]) for window in windows]
    assert sum(x.sum() for _, x in score(lm.model, short, 1, torch.device("cpu"))) != pytest.approx(-sum(expected))


PAIRS = [
    ("The river saw", " a green bird"),
    ("The river saw ", "a green bird"),  # the blank goes to the continuation
    ("", "The house"),
    (" ", "house"),
    ("The old\n", "bird 12"),
    ("é", " 日本"),
    (TEXT * 4, " never"),  # cut from the left
    ("a", TEXT[:8]),
]


def test_continuations_have_the_sums_of_their_own_tokens(lm, exact):
    """In every order and batch; where the whole is longer than the context, of what is left."""
    got = lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    for (context, continuation), (nats, greedy) in zip(PAIRS, got, strict=True):
        whole, before = encode(lm, context + continuation), encode(lm, context.rstrip())
        assert whole[: len(before)] == before
        n = len(whole) - len(before)
        tokens = whole[-CONTEXT - 1 :]
        rows = exact(tokens)
        chosen = [(rows[i, tokens[i + 1]], rows[i].argmax() == tokens[i + 1]) for i in range(len(rows) - n, len(rows))]
        assert nats == pytest.approx(sum(x for x, _ in chosen), rel=1e-6), (context, continuation)
        assert greedy == all(y for _, y in chosen)


def test_a_continuation_is_greedy_where_the_model_would_write_it(lm):
    """And is not, where one token of it differs."""
    tokens = encode(lm, "The river")
    made = lm.model.generate(torch.tensor([tokens]), 5, temperature=0)[0].tolist()
    other = [*made[:3], (made[3] + 1) % 330, made[4]]
    asked = [(None, tokens, made), (None, tokens, other), (None, tokens, made[:1]), (None, tokens, [])]
    got = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [True, False, True, True]
    assert got[3][0] == 0


def test_a_token_across_the_border_leaves_nothing_out(lm):
    """Two halves of a word that is one token: the second is scored as it is written, not dropped."""
    tokenizer = lm.tokenizer_of_text
    word = max((tokenizer.decode([n]) for n in range(330)), key=lambda x: (x.isalpha(), len(x)))
    assert len(tokenizer.encode(word)) == 1 and word.isalpha()
    before, after = lm._encode_pair(word[:2], word[2:])
    assert before == encode(lm, word[:2])
    assert after and tokenizer.decode(after) == word[2:]


def test_the_head_is_applied_to_the_continuation_alone(lm, largest_tensor):
    """Logits of a whole context would be V / d as large as its hidden states."""
    lm.max_length = 400
    tokens = [1, *([5, 6, 7, 8] * 99)]
    with largest_tensor() as largest:
        lm._loglikelihood_tokens([(None, tokens, [9, 10])] * 3, disable_tqdm=True)
    assert largest.n_bytes < 3 * len(tokens) * 330 * 4


def test_likeliest_works_in_pieces(monkeypatch):
    monkeypatch.setattr(lm_eval_model, "ROWS", 3)
    hidden, weight = torch.randn(10, 4), torch.randn(17, 4)
    assert torch.equal(likeliest(hidden, weight), (hidden @ weight.T).argmax(-1))
    assert likeliest(hidden[:0], weight).shape == (0,)


def test_bf16_is_near_fp32(lm, export):
    half = LcptLM(str(export), precision="bf16", device="cpu")
    [got], [expected] = (x.loglikelihood_rolling(ask((TEXT,)), disable_tqdm=True) for x in (half, lm))
    assert got != expected
    assert got == pytest.approx(expected, rel=2e-2)


def continuation(lm, prompt, n):
    tokens = encode(lm, prompt)
    made = lm.model.generate(torch.tensor([tokens]), n, temperature=0)[0].tolist()
    made = made[: made.index(1)] if 1 in made else made
    return lm.tokenizer_of_text.decode([*tokens, *made])[len(prompt) :]


def test_generates_the_likeliest_text_up_to_a_stop(lm):
    text = continuation(lm, "The river", 12)
    assert len(text) > 4
    stop = text[3:5]
    asked = ask(
        ("The river", {"until": [], "max_gen_toks": 12}),
        ("The river", {"until": [stop, ""], "max_gen_toks": 12, "temperature": 0.9, "do_sample": False}),
        ("The river", {"until": stop, "max_new_tokens": 12}),
        ("The river", {"max_gen_toks": 2}),
    )
    first, *stopped, short = lm.generate_until(asked, disable_tqdm=True)
    assert first == text
    assert stopped == [text[: text.find(stop)]] * 2
    assert short == continuation(lm, "The river", 2)


def test_characters_of_several_tokens_come_whole(lm, monkeypatch):
    """Bytes that are tokens; the last character is cut by max_gen_toks, or begins the stop."""
    text = "é 日本語 ok"
    tokens = lm.tokenizer_of_text.encode(text)
    assert len(tokens) > len(text)
    monkeypatch.setattr(lm_eval_model, "generate", lambda *_: iter(torch.tensor(tokens)[:, None]))
    n = len(tokens)
    asked = ask(("a", {"max_gen_toks": n}), ("a", {"max_gen_toks": n, "until": ["本語"]}))
    lm.max_length = 4 * n
    assert lm.generate_until(asked, disable_tqdm=True) == [text, "é 日"]


def test_bos_ends_a_text(lm, monkeypatch):
    tokens = [*lm.tokenizer_of_text.encode("The"), 1, 5, 6]
    monkeypatch.setattr(lm_eval_model, "generate", lambda *_: iter(torch.tensor(tokens)[:, None]))
    assert lm.generate_until(ask(("a", {"max_gen_toks": 20})), disable_tqdm=True) == ["The"]


def test_sampling_draws_as_the_seed_says(lm):
    asked = ask(("The", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 15}))

    def made(seed):
        torch.manual_seed(seed)
        return lm.generate_until(asked, disable_tqdm=True)

    assert made(1) == made(1)
    assert len({made(seed)[0] for seed in range(4)}) > 1


def test_a_prompt_is_cut_from_the_left(lm):
    [long], [kept] = (
        lm.generate_until(ask((text, {"max_gen_toks": 4})), disable_tqdm=True)
        for text in (TEXT * 9, "old " * 90 + TEXT)
    )
    assert long == kept


def test_what_is_out_of_range_is_named(lm, export):
    with pytest.raises(ValueError, match="max_gen_toks 24 must lie in 1 … 23"):
        lm.generate_until(ask(("The", {"max_gen_toks": 24})), disable_tqdm=True)
    with pytest.raises(ValueError, match="exceeds the context of 24"):
        lm.loglikelihood(ask(("The", TEXT * 2)), disable_tqdm=True)
    for name, value in {"precision": "fp16", "batch_size": "auto", "context": 0}.items():
        with pytest.raises(ValueError, match=name):
            LcptLM(str(export), **{name: value})


def test_the_tokenizer_is_that_of_the_checkpoint(lm, train_folder):
    assert lm.tokenizer_name == Tokenizer(train_folder / "tokenizer.model").sha256
    assert lm.eot_token_id == lm.prefix_token_id == 1
