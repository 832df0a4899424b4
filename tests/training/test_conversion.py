"""A softmax model goes on as a hybrid: at every ZeRO stage alike, on one rank or two, and after a restart."""

import math

import numpy as np
import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.config import load_config, to_yaml
from lcpt.data import open_text
from lcpt.model import GPT, ModelConfig
from lcpt.model.conversion import load_fitting, open_source
from lcpt.model.pretrained import Pretrained, write_pretrained

SIZES = {"n_layers": 4, "d_model": 32, "n_heads": 2, "vocab_size": 330}
MODELS = {
    "qwen3": ModelConfig(
        **SIZES,
        n_kv_heads=1,
        norm="rms_norm",
        norm_eps=1e-6,
        feed_forward="swiglu",
        d_ff=48,
        tie_embeddings=False,
        rope_base=1e6,
        attention=AttentionConfig(kind="softmax", key_shift=False, qk_norm="rms_norm", qk_norm_eps=1e-6, head_dim=12),
    ),
    "gpt2": ModelConfig(
        **SIZES,
        feed_forward="gelu_tanh",
        bias=True,
        positions="learned",
        max_positions=64,
        attention=AttentionConfig(kind="softmax", key_shift=False, qk_norm="none", bias=True),
    ),
}
STEPS, FROZEN = 20, 4
SETTINGS = [
    "model.attention.pattern=[polysketch, flurka, polysketch, softmax]",
    "model.attention.block_size=8",
    "model.attention.polysketch.size=8",
    f"training.max_steps={STEPS}",
    "training.lr=0.01",
    "training.parameter_groups=[{match: '*.attention.*', kind: polysketch}, {match: '*.attention.*', kind: flurka}, "
    f"{{match: '*', frozen_steps: {FROZEN}, lr_factor: 0.3}}]",
]


@pytest.fixture(scope="module")
def sources(train_folder, tmp_path_factory):
    """name -> (an export of that model with random weights, a config that trains on the same text with that model)."""
    found, root = {}, tmp_path_factory.mktemp("sources")
    for name, config in MODELS.items():
        torch.manual_seed(1)
        tokenizer = train_folder / "tokenizer.model"
        model = GPT(config)
        write_pretrained(
            Pretrained(folder=root, model=model, tokenizer=tokenizer, context=32, step=0, tokens=0), root / name
        )
        data = [f"data.path={train_folder}", "data.context=32", "run.dir=none", "training.global_batch_tokens=256"]
        data += ["data.valid_path=null", "data.mask_documents=false", "training.micro_batch=2"]
        plain = load_config("gpt2-small-8k", data)
        plain.model = config
        plain.training.precision, plain.training.warmup_steps = "fp32", 2
        (root / f"{name}.yaml").write_text(to_yaml(plain))
        found[name] = root / name, root / f"{name}.yaml"
    return found


@pytest.fixture(scope="module")
def go_on(train_ranks, sources):
    """go_on(name, world, stage, *overrides, dir=None) -> the run of a converted model."""

    def run(name, world, stage, *overrides, dir=None):
        export, yaml = sources[name]
        given = [f"training.init_from={export}", f"parallel.zero_stage={stage}", *SETTINGS, *overrides]
        return train_ranks(world, *given, dir=dir, yaml=yaml)

    return run


@pytest.fixture(scope="module")
def alone(go_on):
    """The runs of one rank without ZeRO."""
    return {name: go_on(name, 1, 0) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_it_begins_with_what_it_takes_and_learns(alone, sources, name):
    """Its first loss is that of the model with the weights it takes, computed here."""
    run = alone[name]
    torch.manual_seed(run.config.run.seed)
    model = GPT(run.config.model)
    found = load_fitting(model, open_source(sources[name][0]))
    assert found.initialised and not found.dropped
    source, seed = open_text(run.config.data), run.config.run.seed
    samples = [source.sample(number, seed, 32) for number in range(8)]
    inputs, labels = (torch.from_numpy(np.stack([getattr(x, part) for x in samples])) for part in ("inputs", "labels"))
    total, count = model(inputs, labels=labels)
    assert run.rows[0]["loss"] == pytest.approx(float(total / count), rel=1e-5)
    losses = [row["loss"] for row in run.rows]
    assert len(losses) == STEPS and all(map(math.isfinite, losses)) and sum(losses[-3:]) < sum(losses[:3]) - 1.5


@pytest.mark.parametrize(
    "name, world, stage",
    [
        pytest.param("qwen3", 1, 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 2, 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 2, 2, marks=pytest.mark.slow),
        pytest.param("gpt2", 2, 3, marks=pytest.mark.slow),
        ("qwen3", 2, 3),
    ],
)
def test_every_stage_trains_it_alike(go_on, alone, name, world, stage):
    rows = go_on(name, world, stage).rows
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in alone[name].rows], rel=1e-3), key
    assert [row["loss"] for row in rows[:5]] == pytest.approx([row["loss"] for row in alone[name].rows[:5]], rel=1e-5)


@pytest.mark.parametrize("stopped", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_it_goes_on_where_it_stopped(go_on, alone, stopped, capfd):
    """Inside the freeze and after it, at another stage; the source is read at the beginning alone."""
    begun = go_on("qwen3", 2, 2, f"training.stop_after_steps={stopped}")
    said = capfd.readouterr().err
    assert "model.attention.kind" not in said  # the pattern decides
    [line] = [line for line in said.splitlines() if "initialised" in line]
    assert "blocks 0, 2: attention.gamma, attention.sketch.P" in line and "blocks 1: attention.feature_map.W" in line
    assert 'model.attention.pattern [] -> ["polysketch", "flurka", "polysketch", "softmax"]' in said
    rows = go_on("qwen3", 1, 3, dir=begun.dir).rows
    assert "init_from is passed over" in capfd.readouterr().err
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone["qwen3"].rows], rel=1e-3)
