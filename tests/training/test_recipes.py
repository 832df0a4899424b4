"""The recipes of configs/recipes/, run in small: lengths are a 512th of what they say, the model is tiny."""

from pathlib import Path

import pytest
import torch
import yaml

from lcpt.config import load_config
from lcpt.model import GPT, load_pretrained
from lcpt.model.pretrained import Pretrained, write_pretrained
from lcpt.training.phases import divide

RECIPES = Path(__file__).parents[2] / "configs/recipes"
TINY = [
    "model.n_layers=4",
    "model.d_model=32",
    "model.n_heads=2",
    "model.vocab_size=330",
    "model.attention.block_size=8",
    "model.attention.polysketch.size=8",
    "training.precision=fp32",
    "training.valid_tokens=64",
    "training.valid_every_steps=1000",
]


def shrunk(section):
    """The same with small lengths: contexts of 16 for 8,192, four sequences a step, a step for each thousand."""
    if isinstance(section, list):
        return [shrunk(item) for item in section]
    if not isinstance(section, dict):
        return section
    small = {key: shrunk(value) for key, value in section.items()}
    for key in ("until_step", "max_steps", "warmup_steps", "frozen_steps"):
        if key in small:
            small[key] //= 1000
    if "context" in small:
        small["context"] //= 512
    return small | ({"global_batch_tokens": 256} if "global_batch_tokens" in small else {})


@pytest.fixture(scope="module")
def small(train_folder, make_corpus, valid_folder, tmp_path_factory):
    """small(recipe) -> a YAML file of it in small, with data that are there."""
    books = make_corpus(seed=5, tokenizer=train_folder / "tokenizer.model", sentences=100)
    places = {"data/prepared/web": train_folder, "data/prepared/books": books, "data/prepared/valid": valid_folder}

    def write(recipe):
        text = (RECIPES / f"{recipe}.yaml").read_text()
        for place, folder in places.items():
            text = text.replace(place, str(folder))
        path = tmp_path_factory.mktemp("recipe") / "small.yaml"
        path.write_text(yaml.safe_dump(shrunk(yaml.safe_load(text))))
        return path

    return write


@pytest.fixture(scope="module")
def train(train_ranks, small):
    """train(recipe, *overrides) -> the run of that recipe."""
    return lambda recipe, *overrides, world=1: train_ranks(world, *TINY, *overrides, yaml=small(recipe))


def test_a_trunk_is_annealed_in_a_branch(train):
    trunk = train("trunk", "training.max_steps=6")
    branch = train("anneal", f"training.branch_from={trunk.dir}", "training.max_steps=5")
    rates = [row["learning_rate"] for row in trunk.rows + branch.rows]
    assert rates == pytest.approx([6e-4] * 6 + [6e-4 * n / 5 for n in (4, 3, 2, 1, 0)])
    before, after = trunk.rows[-1]["source_tokens"], branch.rows[0]["source_tokens"]
    assert all(before[path] <= after[path] <= before[path] + 256 for path in before)


def test_the_context_grows_in_one_run(train):
    run = train("longer-context")
    assert [phase.config.data.context for phase in divide(run.config)] == [16, 32, 64]
    assert len(run.rows) == 20 and run.rows[-1]["learning_rate"] == pytest.approx(0.05 * 6e-4)
    assert sum(run.rows[-1]["source_tokens"].values()) > 19 * 256


def test_ranks_share_a_sequence(train, small, call_program):
    """As four nodes of eight GPUs in a dry run, and four ranks really."""
    config = "--config", small("one-sequence-a-node"), *TINY, "training.global_batch_tokens=2048"
    code, said, _ = call_program("launch/pretrain.py", *config, "--dry-run", "--ranks", 32)
    assert code == 0 and "a start on 32 ranks would begin; micro-batches a rank and step: 1;" in said
    run = train("one-sequence-a-node", "training.global_batch_tokens=1024", "parallel.sequence=4", world=4)
    assert len(run.rows) == 5 and run.rows[-1]["loss"] < run.rows[0]["loss"]


def test_a_softmax_model_is_converted(train, small, train_folder, tmp_path, capfd):
    """From an export of the recipe's own model with softmax in all layers; the frozen weights move after their step."""
    sizes = ["model.n_kv_heads=1", "model.d_ff=48", "model.attention.head_dim=16"]
    model = load_config(small("convert"), [*TINY, *sizes]).model
    model.attention.pattern, model.attention.kind = [], "softmax"
    trained = Pretrained(
        folder=tmp_path, model=GPT(model), tokenizer=train_folder / "tokenizer.model", context=16, step=0, tokens=0
    )
    write_pretrained(trained, tmp_path / "export")
    kept = ["checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    run = train("convert", *sizes, f"training.init_from={tmp_path}/export", *kept)
    assert "blocks 0-2: attention.feature_map.W, attention.gamma, attention.summaries" in capfd.readouterr().err
    assert run.config.model.kinds == ["flurka"] * 3 + ["softmax"] and len(run.rows) == 4
    assert [row["learning_rates"]["*"] > 0 for row in run.rows] == [False, True, True, False]  # it ends at rate 0
    steps = [load_pretrained(run.dir / f"checkpoints/step-0000000{n}").state_dict() for n in (1, 2)]
    for name, before in trained.model.state_dict().items():
        assert torch.equal(steps[0][name], before) != name.startswith(tuple(f"blocks.{n}.attention." for n in range(3)))
        assert not torch.equal(steps[1][name], before), name


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_a_config(recipe):
    load_config(RECIPES / f"{recipe}.yaml")
