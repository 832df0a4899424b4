"""Imported models have the logits that transformers has, and lose nothing on the way."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcpt.model.huggingface.import_folder import import_folder
from lcpt.model.pretrained import open_pretrained, write_export
from tests.model.huggingface.conftest import CONTEXT, LLAMA3, MODELS, YARN, V, edit


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(theirs, tmp_path, name):
    """fp32 at ragged lengths. Angles of positions are fp32 in transformers and float64 here, which is most of it."""
    model, folder = theirs(name)
    imported = import_folder(folder, tmp_path / "export")
    trained = open_pretrained(tmp_path / "export")
    assert (trained.context, trained.step, trained.tokens) == (CONTEXT, 0, 0) and imported.widened == []
    assert sum(p.numel() for p in trained.model.parameters()) == sum(p.numel() for p in model.parameters())
    for length in (1, 37, 300, 517):
        tokens = torch.randint(V, (2, length))
        with torch.no_grad():
            expected, found = model(tokens).logits, trained.model(tokens)
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_without_their_fp32_angles_little_is_left(theirs, tmp_path):
    """The tables of lcpt, given to transformers: in float64, but for norms and tables, which stay fp32."""
    model, folder = theirs("qwen3")
    import_folder(folder, tmp_path / "export")
    ours, tokens = open_pretrained(tmp_path / "export").model.double(), torch.randint(V, (1, 900))

    def exact(x, position_ids):
        angles = position_ids[..., None] * 10_000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().float().double(), angles.sin().float().double()

    rotary = model.model.rotary_emb
    try:
        model.double()
        rotary.forward = exact
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=0, atol=1e-6)
    finally:
        del rotary.forward
        model.float()


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3", "qwen3 window"])
def test_generation_from_the_cache_is_theirs(theirs, tmp_path, name):
    """Greedily, and the logits of each step."""
    model, folder = theirs(name)
    import_folder(folder, tmp_path / "export")
    ours, prompt = open_pretrained(tmp_path / "export").model, torch.randint(1, V, (2, 50))
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        eos_token_id=V + 1,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(ours.generate(prompt, 20, temperature=0.0), made.sequences[:, 50:])
    logits, cache = ours.prefill(prompt, last_only=True)
    for number, expected in enumerate(made.logits):
        torch.testing.assert_close(logits.reshape(2, V), expected, rtol=0, atol=1e-5)
        logits, cache = ours.decode(made.sequences[:, 50 + number], cache)


@pytest.mark.parametrize("name", ["gpt2", "llama biases", "qwen3"])
def test_an_export_of_it_is_read_back_bit_for_bit(theirs, tmp_path, name):
    _, folder = theirs(name)
    imported = import_folder(folder, tmp_path / "export").trained.model.state_dict()
    write_export(tmp_path / "export", tmp_path / "again")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "export" / file).read_bytes()
    read = open_pretrained(tmp_path / "again").model.state_dict()
    assert read.keys() == imported.keys() and all(torch.equal(read[key], imported[key]) for key in read)


def test_every_tensor_is_in_its_place(theirs, tmp_path):
    """By hand, for one layer: which rows, and which way round."""
    theirs_ = load_file(theirs("gpt2")[1] / "model.safetensors")
    ours = import_folder(theirs("gpt2")[1], tmp_path / "gpt2").trained.model.state_dict()
    assert torch.equal(ours["blocks.1.attention.qkv.weight"], theirs_["transformer.h.1.attn.c_attn.weight"].T)
    assert torch.equal(ours["blocks.1.feed_forward.up.bias"], theirs_["transformer.h.1.mlp.c_fc.bias"])
    theirs_ = load_file(theirs("llama 3")[1] / "model.safetensors")
    ours = import_folder(theirs("llama 3")[1], tmp_path / "llama").trained.model.state_dict()
    layer = "model.layers.1.self_attn"
    parts = [theirs_[f"{layer}.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(ours["blocks.1.attention.qkv.weight"], torch.cat(parts))
    parts = [theirs_[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(ours["blocks.1.feed_forward.up.weight"], torch.cat(parts))


def imported(folder, tmp_path, name="export"):
    return import_folder(folder, tmp_path / name).trained.model.state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["gpt2", "qwen3 tied"])
def test_shards_are_one_model(theirs, tmp_path, name):
    model, folder = theirs(name)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "sharded/tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert_same(imported(tmp_path / "sharded", tmp_path, "one"), imported(folder, tmp_path, "other"))


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_narrower_weights_are_widened_and_that_is_said(copy, tmp_path, dtype, name):
    folder = copy("llama 3")
    tensors = {key: x.to(dtype) for key, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    done = import_folder(folder, tmp_path / "export")
    assert done.widened == [name]
    head = load_file(tmp_path / "export/model.safetensors")["head.weight"]
    assert head.dtype == torch.float32 and torch.equal(head.to(dtype), tensors["lm_head.weight"])


def test_files_of_older_versions_are_the_same_model(copy, theirs, tmp_path):
    """Without the prefix, with buffers of masks and frequencies, with a tied head saved again."""
    folder = copy("gpt2")
    tensors = {k.removeprefix("transformer."): x for k, x in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{n}.attn.{x}": torch.ones(1, 1, 8, 8) for n in (0, 1) for x in ("bias", "masked_bias")}
    save_file(tensors | masks | {"lm_head.weight": tensors["wte.weight"].clone()}, folder / "model.safetensors")
    assert_same(imported(folder, tmp_path, "one"), imported(theirs("gpt2")[1], tmp_path, "other"))
    folder = copy("llama 2")
    tensors = load_file(folder / "model.safetensors")
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in (0, 1)}
    save_file(tensors | frequencies, folder / "model.safetensors")
    assert_same(imported(folder, tmp_path, "three"), imported(theirs("llama 2")[1], tmp_path, "four"))


def test_positions_of_older_versions_are_the_same(copy, tmp_path):
    """rope_theta and rope_scaling, with `type` or `rope_type`, in place of rope_parameters."""
    expected = import_folder(copy("llama 3"), tmp_path / "new").trained.model.config
    older = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    for number, kind in enumerate(("type", "rope_type")):
        folder = edit(copy("llama 3"), rope_parameters=None, rope_theta=5000.0, rope_scaling=older | {kind: "llama3"})
        assert import_folder(folder, tmp_path / f"old-{number}").trained.model.config == expected
    assert (expected.rope_base, expected.rope_scaling.llama3.original_context) == (5000.0, 64)


@pytest.mark.parametrize(
    "given, outside, same",
    [
        ({"factor": None}, {}, {}),  # CONTEXT / original
        ({"original_max_position_embeddings": 512}, {"original_max_position_embeddings": 256}, {}),
        ({"original_max_position_embeddings": None}, {}, {"original_max_position_embeddings": CONTEXT}),
        ({"beta_fast": None, "mscale": 0.7}, {}, {"beta_fast": 32, "beta_slow": 1.0}),
        ({"attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 2.0}, {}, {"attention_factor": 1.5}),
        ({"rope_theta": None}, {"rope_theta": 5000}, {}),
    ],
    ids=str,
)
def test_keys_of_positions_stand_for_each_other(copy, theirs, tmp_path, given, outside, same):
    """As transformers 5 takes them: its frequencies of both configs are alike."""
    from transformers import AutoModelForCausalLM

    configs, frequencies, missing = [], [], [key for key in given if given[key] is None and key != "factor"]
    for number, (section, keys) in enumerate([(YARN | given, outside), (YARN | same, {})]):
        section = {key: value for key, value in section.items() if number or key not in missing}
        folder = edit(copy("llama yarn"), rope_parameters=section, **keys)
        configs.append(import_folder(folder, tmp_path / f"export-{number}").trained.model.config)
        rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
        frequencies.append(torch.cat((rotary.inv_freq, torch.tensor([rotary.attention_scaling]))))
    assert configs[0] == configs[1] and torch.equal(*frequencies)


def test_keys_of_published_configs_come_in(copy, tmp_path):
    """What OpenAI's GPT-2, SmolLM and Qwen3 have beside the sizes."""
    length = {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
    import_folder(edit(copy("gpt2"), n_ctx=1024, _num_labels=0, torch_dtype="float32", **length), tmp_path / "gpt2")
    smol = dict(is_llama_config=True, rope_interleaved=False, pretraining_tp=2, rope_scaling={})
    import_folder(edit(copy("llama 2"), _name_or_path="x", attention_dropout=0.1, **smol), tmp_path / "llama")
    qwen = dict(max_window_layers=28, sliding_window=4096, use_sliding_window=False)
    assert (
        import_folder(edit(copy("qwen3"), **qwen), tmp_path / "qwen").trained.model.config.attention.softmax.window
        is None
    )


def test_missing_keys_mean_what_transformers_takes_them_for(copy, tmp_path):
    folder = edit(copy("qwen3"), rope_parameters=None, layer_types=None, tie_word_embeddings=None, rms_norm_eps=None)
    assert import_folder(folder, tmp_path / "export").trained.model.config.rope_base == 10_000.0


def test_it_needs_no_transformers(theirs, tmp_path):
    import subprocess
    import sys

    program = f"""
import sys
sys.modules |= dict.fromkeys(("transformers", "deepspeed", "triton"))
from lcpt.model.huggingface.import_folder import import_folder
import_folder({str(theirs("qwen3")[1])!r}, {str(tmp_path / "export")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "export/config.json").read_text())["model"]["attention"]["qk_norm"] == "rms_norm"
