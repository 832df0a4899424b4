"""transformers' `generate` with lcpt's cache: the tokens that it gives without, in constant memory for linear kinds."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.base import LinearCost
from lcpt.model import GPT
from tests.model.conftest import CONFIGS, V, config
from tests.model.huggingface.conftest import pad

LINEAR = [kind for kind in ATTENTION if issubclass(CONFIGS[kind].attention.attention_of_layer(0), LinearCost)]
FREE = dict(eos_token_id=None, pad_token_id=0)  # it goes on after BOS, which a model of chance draws soon


def cache_bytes(cache) -> int:
    leaves = tree_leaves([state.states for _, state in cache.states])
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", [*ATTENTION, "gpt2", "llama", "nothing by default"])
def test_the_cache_changes_no_token(make_model, name):
    model, _ = make_model(CONFIGS[name])
    prompts = torch.randint(1, V, (2, 9))
    cached, uncached = (
        model.generate(prompts, max_new_tokens=9, do_sample=False, use_cache=use_cache, **FREE)
        for use_cache in (True, False)
    )
    assert cached.shape == (2, 18) and torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", LINEAR)
def test_the_cache_of_a_linear_kind_does_not_grow(make_model, kind):
    """Its last blocks fill and empty, so it is looked at where they are as full."""
    model, _ = make_model(CONFIGS[kind])
    sizes = []
    for length in (33, 33 + 4 * 64):
        cache = model(torch.randint(1, V, (1, length)), use_cache=True).cache
        output = model.generate(
            torch.randint(1, V, (1, 1)),
            attention_mask=torch.ones(1, length + 1),
            cache=cache,
            max_new_tokens=12,
            return_dict_in_generate=True,
            **FREE,
        )
        assert output.cache is cache and cache.get_seq_length() == length + 12
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1] > 0


def test_the_cache_of_softmax_does(make_model):
    model, _ = make_model(CONFIGS["softmax"])
    few, many = (cache_bytes(model(torch.randint(1, V, (1, n)), use_cache=True).cache) for n in (33, 330))
    assert many > 8 * few


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["polysketch", "gpt2", "nothing by default"])
def test_a_batch_with_padding_on_the_left_goes_on_as_each_row_alone(make_model, name, use_cache):
    model, _ = make_model(CONFIGS[name])
    rows = [torch.randint(1, V, (length,)) for length in (5, 13, 5, 1)]
    tokens, mask = pad(rows, "left", 13, 0), pad([torch.ones_like(row) for row in rows], "left", 13, 0)
    options = dict(max_new_tokens=7, do_sample=False, use_cache=use_cache, **FREE)
    together = model.generate(tokens, attention_mask=mask, **options)
    for row, found in zip(rows, together[:, 13:], strict=True):
        assert torch.equal(found, model.generate(row[None], **options)[0, len(row) :])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_with_padding_on_the_right_is_refused(make_model, use_cache):
    model, _ = make_model()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="after padding; pad on the left: tokenizer.padding_side = 'left'"):
        model.generate(torch.randint(1, V, (2, 3)), attention_mask=mask, max_new_tokens=2, use_cache=use_cache, **FREE)


def test_a_cache_takes_no_padding_after_a_text(make_model):
    model, _ = make_model()
    tokens, whole, padded = torch.randint(1, V, (2, 3)), torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="cannot go on after padding"):
        model(tokens, padded, use_cache=True)
    cache = model(tokens, whole, use_cache=True).cache
    for middle in (padded, padded.flip(1)):
        with pytest.raises(ValueError, match="cannot go on after padding"):
            model(tokens, torch.cat((whole, middle), dim=1), cache=cache)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", ["polysketch", "flurka", "sparse_hash", "softmax"])
def test_beam_search_reorders_the_cache(make_model, name):
    model, _ = make_model(CONFIGS[name])
    rows = [torch.randint(1, V, (length,)) for length in (5, 9)]
    tokens, mask = pad(rows, "left", 9, 0), pad([torch.ones_like(row) for row in rows], "left", 9, 0)
    options = dict(max_new_tokens=10, num_beams=4, num_return_sequences=2, do_sample=False, **FREE)
    found, expected = (model.generate(tokens, attention_mask=mask, use_cache=x, **options) for x in (True, False))
    assert found.shape == (4, 19) and torch.equal(found, expected)


def test_samples_depend_on_the_seed_alone(make_model):
    model, _ = make_model()
    drawn = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        drawn.append(
            model.generate(
                torch.full((2, 3), 7), max_new_tokens=20, do_sample=True, top_k=20, num_return_sequences=3,
                use_cache=use_cache, **FREE,
            )
        )  # fmt: skip
    assert drawn[0].shape == (6, 23) and len(drawn[0].unique(dim=0)) == 6
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_it_is_what_lcpt_generates(make_model):
    model, ours = make_model()
    prompt = torch.randint(1, V, (2, 9))
    found = model.generate(prompt, max_new_tokens=20, do_sample=False, **FREE)[:, 9:]
    assert torch.equal(found, ours.generate(prompt, 20, temperature=0.0))


def test_a_text_ends_with_bos_and_may_begin_with_nothing(make_model):
    model, _ = make_model()
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are alike, and argmax takes the first
        model.model.embedding.weight.zero_()
    assert model.generate(max_new_tokens=3, do_sample=False).tolist() == [[1, 0, 0, 0]]
    model.generation_config.suppress_tokens = [0]
    assert model.generate(max_new_tokens=3, do_sample=False).tolist() == [[1, 1]]


def test_a_cache_goes_on_where_it_ended(make_model):
    """Given the whole text, or what is new of it, after padding too."""
    model, _ = make_model()
    rows = [torch.randint(1, V, (length,)) for length in (4, 7)]
    tokens, mask = pad(rows, "left", 7, 0), pad([torch.ones_like(row) for row in rows], "left", 7, 0)
    options = dict(do_sample=False, return_dict_in_generate=True, **FREE)
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=15, **options).sequences
    first = model.generate(tokens, attention_mask=mask, max_new_tokens=6, **options)
    longer = torch.cat((mask, torch.ones(2, 6, dtype=torch.int64)), dim=1)
    again = model.generate(
        first.sequences, attention_mask=longer, cache=first.cache, max_new_tokens=9, **options
    ).sequences
    assert torch.equal(again, expected)


def test_a_long_prompt_is_read_in_pieces(make_model, monkeypatch):
    model, ours = make_model()
    monkeypatch.setitem(type(model).forward.__globals__, "PIECE", 5)
    lengths, extend = [], GPT.extend

    def noting(gpt, tokens, cache):
        lengths.append(tokens.shape[1])
        return extend(gpt, tokens, cache)

    monkeypatch.setattr(GPT, "extend", noting)
    tokens = torch.randint(1, V, (2, 13))
    torch.testing.assert_close(model(tokens, use_cache=True).logits, ours(tokens), rtol=1e-5, atol=1e-5)
    assert lengths == [5, 5, 3]


def test_a_text_beyond_the_learned_positions_is_named(make_model):
    model, _ = make_model(CONFIGS["gpt2"])
    assert model.generate(torch.randint(1, V, (1, 60)), max_new_tokens=4, **FREE).shape == (1, 64)
    with pytest.raises(ValueError, match="a sequence of 65 tokens exceeds model.max_positions 64"):
        model.generate(torch.randint(1, V, (1, 60)), max_new_tokens=6, **FREE)


def test_what_would_take_tokens_back_is_refused(make_model):
    model, _ = make_model()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(torch.randint(1, V, (1, 6)), assistant_model=model, max_new_tokens=4)
    cache = model(torch.randint(1, V, (1, 6)), use_cache=True).cache
    with pytest.raises(ValueError, match="cannot forget tokens"):
        cache.crop(1)


def test_a_cache_of_transformers_own_is_refused(make_model):
    from transformers import DynamicCache

    model, _ = make_model()
    with pytest.raises(ValueError, match="cache is a DynamicCache; give what this model returned"):
        model.generate(torch.randint(1, V, (1, 6)), cache=DynamicCache(), max_new_tokens=2, **FREE)


def test_rows_of_a_cache_are_repeated_and_chosen(make_model):
    model, _ = make_model(config(attention=AttentionConfig("polysketch", block_size=4)))
    rows = [torch.randint(1, V, (length,)) for length in (4, 7, 4)]
    tokens, mask = pad(rows, "left", 7, 0), pad([torch.ones_like(row) for row in rows], "left", 7, 0)
    more = torch.randint(1, V, (6, 5))
    cache = model(tokens, mask, use_cache=True).cache
    cache.batch_repeat_interleave(2)
    found = model(more, cache=cache).logits
    for n, logits in enumerate(found):
        alone = model(torch.cat((rows[n // 2], more[n]))[None]).logits[0, -5:]
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    cache.batch_select_indices(torch.tensor([5, 2]))
    last = model(torch.tensor([[3], [3]]), cache=cache).logits
    for place, n in enumerate((5, 2)):
        alone = model(torch.cat((rows[n // 2], more[n], torch.tensor([3])))[None]).logits[0, -1:]
        torch.testing.assert_close(last[place], alone, rtol=1e-5, atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


def test_pipelines_and_streamers_continue_texts(make_export, capsys):
    from transformers import AutoTokenizer, TextStreamer, pipeline

    folder, _ = make_export(config(vocab_size=330))
    texts = ["The river", "Never quickly, the old house"]
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    options = dict(max_new_tokens=6, do_sample=False)
    together, alone = generate(texts, batch_size=2, **options), [generate(text, **options) for text in texts]
    assert together == alone
    assert [found["generated_text"].startswith(text) for (found,), text in zip(alone, texts, strict=True)] == [
        True,
        True,
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    generate.model.generate(**tokenizer(texts[0], return_tensors="pt"), streamer=streamer, **options)
    assert capsys.readouterr().out.rstrip("\n") == alone[0][0]["generated_text"].rstrip("\n")
