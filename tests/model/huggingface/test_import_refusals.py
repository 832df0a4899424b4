"""What lcpt cannot carry over, or what is damaged, is one line that names it, and leaves nothing."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcpt.model.huggingface.import_folder import import_folder
from lcpt.model.huggingface.import_settings import Settings
from tests.model.huggingface.conftest import LLAMA3, YARN, edit
from tests.tiny_tokenizers import byte_level, change


def refusal(folder) -> str:
    """The line with which it is refused."""
    output = folder.parent / "refused"
    with pytest.raises(ValueError, match=".") as caught:
        import_folder(folder, output)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and not output.exists()
    return line


ROPE = "rope_parameters"
SLIDING = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    "name, keys, remark",
    [
        ("llama 2", {"model_type": "mistral"}, "model_type is 'mistral'; lcpt imports gpt2, llama, qwen3, lcpt"),
        ("llama 2", {"model_type": None}, "model_type is None; lcpt imports"),
        ("llama 2", {"architectures": ["LlamaForSequenceClassification"]}, "lcpt has LlamaForCausalLM, LlamaModel"),
        ("llama 2", {"hidden_act": "relu"}, 'hidden_act is "relu"; lcpt has silu, swish, gelu'),
        ("gpt2", {"activation_function": "gelu"}, 'activation_function is "gelu"; lcpt has gelu_new'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true; lcpt's scores"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false; lcpt's scores"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true"),
        (
            "llama 2",
            {ROPE: {"rope_type": "dynamic", "factor": 2.0}},
            f'{ROPE}.rope_type is "dynamic"; lcpt has',
        ),
        ("llama 2", {ROPE: {"rope_type": "longrope"}}, "longrope"),
        ("llama 2", {ROPE: None, "rope_scaling": {"type": "ntk"}}, 'rope_scaling.type is "ntk"; lcpt has'),
        ("llama 2", {ROPE: {"rope_type": "linear"}}, f"{ROPE}.factor is null; it must be a number > 0"),
        ("llama 2", {ROPE: {"rope_type": "default", "mrope_section": [4, 4]}}, f"{ROPE}.mrope_section is [4, 4]; lcpt"),
        ("llama 2", {ROPE: LLAMA3 | {"factor": 0.5}}, "describes no model of lcpt: model.rope_scaling.llama3.factor"),
        ("llama 2", {ROPE: YARN | {"truncate": False}}, f"{ROPE}.truncate is false"),
        ("llama 2", {ROPE: {"partial_rotary_factor": 0.5}}, f"{ROPE}.partial_rotary_factor is 0.5"),
        ("llama 2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; lcpt's rotary positions turn whole"),
        (
            "llama 2",
            {"rope_scaling": LLAMA3},
            "rope_scaling is {",
        ),
        ("llama 2", {ROPE: [1]}, f"{ROPE} is [1]; it must be a section"),
        ("llama 2", {"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}; lcpt reads weights of'),
        ("llama 2", {"sliding_window": 64}, "sliding_window is 64; lcpt does not know this key"),
        ("llama 2", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0; lcpt does not know this key"),
        ("llama 2", {"auto_map": {"AutoModel": "x.py"}}, "auto_map is"),
        ("llama 2", {"hidden_size": "64"}, 'hidden_size is "64"; it must be a whole number ≥ 1'),
        ("llama 2", {"num_hidden_layers": True}, "num_hidden_layers is true; it must be a whole number"),
        ("llama 2", {"num_key_value_heads": 3}, "describes no model of lcpt: model.n_heads 4 is no multiple"),
        ("llama 2", {"head_dim": 15}, "describes no model of lcpt: model.attention.head_dim is 15"),
        ("llama 2", {"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a number > 0"),
        ("llama 2", {"attention_bias": "yes"}, 'attention_bias is "yes"; it must be true or false'),
        ("qwen3", {"layer_types": SLIDING, "use_sliding_window": True}, "layer_types is ["),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window is false; they must agree"),
        ("qwen3", {"layer_types": ["full_attention"]}, "it must name each of the 2 layers"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 2},
            "lcpt's softmax layers have a sliding window all, or none",
        ),
        (
            "qwen3",
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "max_window_layers is 1; lcpt's softmax layers have a sliding window all, or none",
        ),
    ],
    ids=str,
)
def test_what_config_json_says_is_carried_over_or_named(copy, name, keys, remark):
    assert remark in refusal(edit(copy(name), **keys))


@pytest.mark.parametrize(
    "name, keys, remark",
    [
        ("llama 2", {"hidden_size": 32, "head_dim": 16}, "is [416, 64], and by config.json [416, 32]"),
        ("llama 2", {"vocab_size": 512}, "model.embed_tokens.weight is [416, 64], and by config.json [512, 64]"),
        ("llama 2", {"num_key_value_heads": 2}, "self_attn.k_proj.weight is [64, 64], and by config.json [32, 64]"),
        ("llama 2", {"num_hidden_layers": 3}, "lacks the tensor model.layers.2."),
        ("llama 2", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight has no place"),
        ("llama 2", {"attention_bias": True}, "lacks the tensor model.layers.0.self_attn.q_proj.bias"),
        ("llama biases", {"mlp_bias": False}, "mlp.down_proj.bias has no place in this model"),
        ("llama 2", {"tie_word_embeddings": True}, "lm_head.weight differs from embed_tokens.weight"),
        ("llama tied", {"tie_word_embeddings": False}, "lacks the tensor"),
        (
            "llama 2",
            {"model_type": "qwen3", "architectures": None, "pretraining_tp": None},
            "lacks the tensor model.layers.0.self_attn.q_norm",
        ),
        ("gpt2", {"n_positions": 512}, "transformer.wpe.weight is [1024, 64], and by config.json [512, 64]"),
        ("gpt2", {"n_inner": 64}, "h.0.mlp.c_fc.weight is [64, 256], and by config.json [64, 64]"),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_is_named(copy, name, keys, remark):
    assert remark in refusal(edit(copy(name), **keys))


def test_quantized_or_double_weights_are_named(copy):
    folder = copy("llama 2")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    for dtype, written in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")):
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
        assert f"{name} is of dtype {written}; lcpt reads F32, BF16, F16" in refusal(folder)


def test_a_mixture_of_two_models_is_named(copy):
    folder = copy("gpt2")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"wte.weight": tensors["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    assert "both with and without the prefix transformer." in refusal(folder)


@pytest.mark.parametrize("how", ["empty", "truncated", "longer", "header", "text"])
def test_damaged_weights_are_named(copy, how):
    path = copy("qwen3") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[:-1],
            "longer": content + b"x",
            "header": content[:20] + b"\xff" + content[21:],
            "text": b"version https://git-lfs.github.com/spec/v1\n",  # what git leaves where git-lfs is missing
        }[how]
    )
    assert f"{path} is no whole safetensors file" in refusal(path.parent)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy, file):
    folder = copy("llama 3")
    (folder / file).unlink()
    assert file in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000])
def test_a_damaged_config_is_named(copy, content):
    folder = copy("llama 3")
    (folder / "config.json").write_bytes(content)
    assert f"{folder / 'config.json'}" in refusal(folder)


def test_pickle_is_not_read(copy):
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    line = refusal(folder)
    assert "pytorch_model.bin is pickle" in line and "convert to safetensors" in line


def test_the_tokenizer_is_checked(copy, tmp_path):
    folder = copy("llama 3")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"SentencePiece")
    assert "has no tokenizer.json; write one" in refusal(folder)
    byte_level(folder / "tokenizer.json", special=["<|endoftext|>", *(f"<|{n}|>" for n in range(200))], vocab_size=600)
    assert "tokens, and the model 416 embeddings" in refusal(folder)
    change(folder / "tokenizer.json", model={"dropout": 0.1})
    assert "model.dropout" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert "tokenizer.json" in refusal(folder)


@pytest.fixture
def sharded(theirs, tmp_path):
    model, folder = theirs("llama 3")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    (tmp_path / "sharded/tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return tmp_path / "sharded"


def reindex(folder, change):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_missing_or_damaged_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    assert f"{shard} is no whole safetensors file" in refusal(sharded)
    shard.unlink()
    assert f"{shard} is missing" in refusal(sharded)


def test_a_damaged_index_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2])
    assert "index.json is no readable JSON" in refusal(sharded)
    for broken in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(broken))
        assert "has no weight_map" in refusal(sharded)
    index.write_bytes(whole)
    reindex(sharded, lambda x: {"weight_map": x["weight_map"] | {"model.norm.weight": "../x.safetensors"}})
    assert "names ../x.safetensors, which is no file of the folder" in refusal(sharded)
    index.write_bytes(whole)
    file = sorted(path.name for path in sharded.glob("*.safetensors"))[0]
    reindex(sharded, lambda x: {"weight_map": x["weight_map"] | {"model.more.weight": file}})
    assert f"{file} lacks model.more.weight" in refusal(sharded)
    index.write_bytes(whole)
    reindex(sharded, lambda x: {"weight_map": {k: f for k, f in x["weight_map"].items() if k != "model.norm.weight"}})
    assert "lacks the tensor model.norm.weight" in refusal(sharded)


def test_an_occupied_output_is_said_first(copy, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine exists and is no empty folder; choose another --output"):
        import_folder(tmp_path / "absent", tmp_path / "mine")


def test_a_key_counts_as_read_by_itself(tmp_path):
    settings = Settings({"read": 1, "unread": 0.5, "harmless": 2, "off": False, "none": None}, tmp_path / "config.json")
    assert settings.size("read", 7) == 1 and settings.size("missing", 7) == 7
    with pytest.raises(ValueError, match=r"config.json: unread is 0.5; lcpt does not know this key"):
        settings.check_all_read({"harmless"})


def test_a_long_value_is_shortened(tmp_path):
    settings = Settings({"layers": ["full_attention"] * 100}, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r'layers is \["full_attention", [^…]{1,80}…; too many$'):
        settings.refuse("layers", "too many")
