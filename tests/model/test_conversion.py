"""A model takes the weights of one whose attention differs: what it keeps, what it draws, and what is refused."""

from dataclasses import replace

import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.base import SHARED, LinearCost
from lcpt.checkpoint import CheckpointError
from lcpt.model import GPT, ModelConfig
from lcpt.model.conversion import by_layer, fit, load_fitting, open_source
from lcpt.model.pretrained import Pretrained, write_pretrained

LLAMA = ModelConfig(
    n_layers=4,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=330,
    norm="rms_norm",
    norm_eps=1e-6,
    feed_forward="swiglu",
    d_ff=48,
    tie_embeddings=False,
    rope_base=1e6,
    attention=AttentionConfig(kind="softmax", key_shift=False, qk_norm="rms_norm", head_dim=12),
)
SHARED_NAMES = ["k_norm.weight", "out.weight", "q_norm.weight", "qkv.weight"]


def converted(config, **options):
    return replace(config, attention=replace(config.attention, **options))


@pytest.fixture(scope="module")
def export(train_folder, tmp_path_factory):
    """LLAMA with random weights, as `lcpt import` would write it."""
    torch.manual_seed(1)
    model = GPT(LLAMA)
    for parameter in model.parameters():  # gains of 1 would hide that they are not taken
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("llama") / "export"
    tokenizer = train_folder / "tokenizer.model"
    trained = Pretrained(folder=folder, model=model, tokenizer=tokenizer, context=64, step=0, tokens=0)
    write_pretrained(trained, folder)
    return folder


def loaded(export, config):
    torch.manual_seed(2)
    model = GPT(config)
    return model.eval(), load_fitting(model, open_source(export))


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_kind_keeps_what_all_kinds_share(kind):
    """What it has beside that is its own: names of shared parts are the whole of softmax's, and gates."""
    options = AttentionConfig(kind, block_size=8, bias=True, output_norm=True)
    if issubclass(ATTENTION[kind].resolve_class(options), LinearCost):
        options = replace(options, gate="data")
    names = ATTENTION[kind](32, 4, 2, options).state_dict()
    softmax = ATTENTION["softmax"](32, 4, 2, options).state_dict()
    shared = {name for name in names if name.split(".")[0] in SHARED}
    assert shared - {"gate_module.projection.weight", "gate_module.projection.bias"} == softmax.keys()


def test_the_same_model_is_the_same(export):
    model, found = loaded(export, LLAMA)
    assert not found.initialised and not found.dropped and set(found.taken) == model.state_dict().keys()
    tokens = torch.randint(330, (1, 40))
    assert torch.equal(model(tokens), loaded(export, replace(LLAMA, d_ff=48, z_loss=0.1))[0](tokens))


@pytest.mark.parametrize("kind, own", [("flurka", ["feature_map.W", "gamma"]), ("polysketch", ["gamma", "sketch.P"])])
def test_layers_of_another_kind_keep_what_fits(export, kind, own):
    config = converted(LLAMA, pattern=[kind, kind, "softmax"], block_size=8)
    model, found = loaded(export, config)
    layers = {name.split(".")[1] for name in found.initialised}
    names = {name.split(".", 3)[3] for name in found.initialised}
    assert layers == {"0", "1", "3"} and names >= set(own) and not names & set(SHARED_NAMES) and not found.dropped
    source = open_source(export)
    for name, tensor in source.read(found.taken):
        assert torch.equal(model.state_dict()[name], tensor), name
    assert len(found.taken) == len(source.shapes)
    torch.manual_seed(2)
    fresh = GPT(config).state_dict()
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in found.initialised)
    assert by_layer(found.initialised).startswith("blocks 0-1, 3: ")


def test_flurka_begins_as_softmax_within_its_last_two_blocks(export):
    """Its local part is softmax: on texts of up to two blocks nothing has changed, beyond them something has."""
    model, _ = loaded(export, converted(LLAMA, pattern=["flurka", "softmax"], block_size=16))
    before, _ = loaded(export, LLAMA)
    tokens = torch.randint(330, (2, 48))
    after, expected = model(tokens), before(tokens)
    torch.testing.assert_close(after[:, :32], expected[:, :32], rtol=1e-4, atol=1e-5)
    assert (after[:, 32:] - expected[:, 32:]).abs().max() > 1e-3


def test_what_a_kind_has_of_its_own_stays_with_it(export, train_folder, tmp_path):
    """The same name and shape in another kind is another thing; in the same kind it is taken, if it fits."""
    then = converted(LLAMA, kind="flurka", block_size=8)
    trained = Pretrained(
        folder=tmp_path, model=GPT(then), tokenizer=train_folder / "tokenizer.model", context=64, step=0, tokens=0
    )
    write_pretrained(trained, tmp_path / "flurka")
    source = open_source(tmp_path / "flurka")
    found = fit(source, converted(LLAMA, kind="polysketch", block_size=8))
    assert "blocks.0.attention.gamma" in found.initialised and "blocks.0.attention.gamma" in found.dropped
    found = fit(source, converted(LLAMA, kind="flurka", block_size=16))  # two summaries a block, not one
    assert "blocks.0.attention.gamma" in found.taken
    changed = {f"blocks.{n}.attention.summaries.W_P.weight" for n in range(4)}
    assert set(found.initialised) == set(found.dropped) == changed


def test_options_of_attention_may_come_and_go(export):
    found = fit(open_source(export), converted(LLAMA, key_shift=True, qk_norm="none", bias=True))
    names = ", ".join(f"attention.{name}" for name in ("key_shift", "out.bias", "qkv.bias"))
    assert by_layer(found.initialised) == f"blocks 0-3: {names}"
    assert by_layer(found.dropped) == "blocks 0-3: attention.k_norm.weight, attention.q_norm.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"n_layers": 3}, "model.n_layers is 4 there and 3 in the config"),
        ({"d_model": 64, "d_ff": 48}, "model.d_model is 32 there and 64"),
        ({"n_heads": 2}, "model.n_heads is 4 there and 2"),
        ({"n_kv_heads": None}, "model.n_kv_heads is 2 there and 4"),
        ({"vocab_size": 331}, "model.vocab_size is 330 there and 331"),
        ({"norm": "layer_norm"}, "model.norm is rms_norm there and layer_norm"),
        ({"feed_forward": "geglu"}, "model.feed_forward is swiglu there and geglu"),
        ({"d_ff": None}, "model.d_ff is 48 there and 80"),
        ({"bias": True}, "model.bias is False there and True"),
        ({"tie_embeddings": True}, "model.tie_embeddings is False there and True"),
        ({"positions": "learned", "max_positions": 64}, "model.positions is rotary there and learned"),
        ({"attention": replace(LLAMA.attention, head_dim=8)}, "model.attention.head_dim is 12 there and 8"),
    ],
)
def test_another_model_is_refused(export, change, said):
    with pytest.raises(CheckpointError) as caught:
        fit(open_source(export), replace(LLAMA, **change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_that_nothing_explains_is_refused(export):
    """As where its file is of another lcpt: the config is the same, and something is missing, or has another shape."""
    source = open_source(export)
    without = {name: shape for name, shape in source.shapes.items() if name != "blocks.1.attention.out.weight"}
    reshaped = source.shapes | {"blocks.1.attention.qkv.weight": [1, 2]}
    strange = source.shapes | {"blocks.1.attention.strange": [3]}
    for shapes in (without, reshaped, strange):
        with pytest.raises(CheckpointError, match=r"holds another model: blocks\.1\.attention\.\w+"):
            fit(replace(source, shapes=shapes), LLAMA)
    with pytest.raises(CheckpointError, match=r"qkv.weight is \[1, 2\] there"):  # another kind explains no other shape
        fit(replace(source, shapes=reshaped), converted(LLAMA, kind="fastmax"))


def test_layers_are_named_in_ranges():
    names = [
        f"blocks.{n}.attention.{x}" for n in (0, 1, 2, 4, 10) for x in ("gamma", "phi.0.W") if (n, x) != (4, "gamma")
    ]
    assert by_layer(names) == "blocks 0-2, 10: attention.gamma, attention.phi.0.W; blocks 4: attention.phi.0.W"
