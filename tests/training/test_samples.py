"""What the model writes while it trains: where it goes, and that it leaves training as it is."""

import itertools
import json

import pytest
import torch

from lcpt.checkpoint import find_checkpoint
from lcpt.data import Corpus, Tokenizer
from lcpt.model import GPT, load_weights
from lcpt.model.generation import Sampling, generate
from lcpt.training.samples import NEW, PROMPT, TEMPERATURE, Samples

SETTINGS = ["training.max_steps=5", "training.micro_batch=2", "checkpoint.every_steps=3"]
SAMPLING = [*SETTINGS, "training.sample_every_steps=2"]
GIVE_UP = 3


def lines(run):
    return [json.loads(line) for line in (run.dir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(train_ranks):
    return train_ranks(2, *SETTINGS)


@pytest.fixture(scope="module")
def whole(train_ranks):
    return train_ranks(2, *SAMPLING)


def test_it_is_what_the_checkpoint_generates(whole, train_folder):
    """Against tokens one by one from a cache; at every second step and at the end."""
    corpus = Corpus(train_folder)
    tokenizer, tokens = Tokenizer(corpus.tokenizer), torch.from_numpy(corpus.document(0)[1][:17])
    prompt = tokenizer.decode(tokens)
    assert [(row["step"], row["prompt"]) for row in lines(whole)] == [(step, prompt) for step in (2, 4, 5)]
    assert len({row["text"] for row in lines(whole)}) == 3
    model = GPT(whole.config.model)
    assert load_weights(model, whole.dir) == find_checkpoint(whole.dir)
    drawn = generate(model, tokens[None], Sampling(TEMPERATURE), [torch.Generator().manual_seed(5)])
    new = map(int, itertools.islice(drawn, 32 - 17))
    new = list(itertools.takewhile(lambda token: token != tokenizer.bos_id, new))
    assert lines(whole)[-1]["text"] == tokenizer.decode([*tokens, *new])[len(prompt) :] != ""


def test_tensorboard_shows_it(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.dir / "tensorboard"))
    events.Reload()
    shown = events.Tensors("samples/train/text_summary")
    assert [event.step for event in shown] == [2, 4, 5]
    text = shown[-1].tensor_proto.string_val[0].decode()
    for part in ("prompt", "text"):
        assert all(f"    {line}\n" in text for line in lines(whole)[-1][part].splitlines())


@pytest.mark.parametrize("world, stage", [(1, 1), (2, 2), (2, 3)])
def test_the_text_is_the_same_on_any_ranks_and_stage(train_ranks, whole, world, stage):
    run = train_ranks(world, *SAMPLING, f"parallel.zero_stage={stage}")
    assert lines(run) == lines(whole)


@pytest.mark.parametrize("stage", [1, 3])
def test_training_is_the_same_without_it(train_ranks, numbers, plain, whole, stage):
    """Bit by bit, and PyTorch's random numbers are untouched."""
    pair = (plain, whole) if stage == 1 else [train_ranks(2, *s, "parallel.zero_stage=3") for s in (SETTINGS, SAMPLING)]
    assert numbers(pair[0].rows) == numbers(pair[1].rows)


def test_lines_after_the_checkpoint_are_dropped(start_job, at_place, send, whole):
    job = start_job(2, *SAMPLING, sabotage=at_place("the update of step 5", send("KILL")))
    assert job.wait() == [-9, -9] and [line["step"] for line in lines(job)] == [2, 4]
    (job.dir / "samples.jsonl").open("a").write('{"step": 5, "prompt": "a", "te')
    again = start_job(2, *SAMPLING)
    assert again.wait() == [0, 0], again.text
    assert "continues from step-00000003" in again.text and lines(again) == lines(whole)


def test_a_validation_set_gives_the_prompt(train_ranks, valid_folder, train_folder):
    sets = f"data.valid={{books: {valid_folder}, other: {train_folder}}}"
    run = train_ranks(1, *SAMPLING, sets, "training.max_steps=3")
    corpus = Corpus(valid_folder)
    assert {line["prompt"] for line in lines(run)} == {Tokenizer(corpus.tokenizer).decode(corpus.document(0)[1][:17])}


def test_broken_weights_write_nonsense_and_end_the_run_as_ever(start_job):
    job = start_job(1, *SAMPLING, "training.lr=1e30", "training.micro_batch=8")
    assert job.wait() == [GIVE_UP], job.text
    assert "ends at step 5 with loss nan" in job.text and "Traceback" not in job.text


@pytest.mark.parametrize("context, known, passes", [(4096, PROMPT, NEW), (32, 17, 15), (2, 2, 0), (1, 1, 0)])
def test_prompt_and_text_fit_the_context(train_folder, context, known, passes):
    """Each pass has the same shape, and each is a place where a rank that hangs is found."""
    corpus, places, shapes = Corpus(train_folder), [], []

    class Watch:
        is_starting = False

        def heartbeat(self, place, timeout_s):
            places.append((place, timeout_s is None))

    def model(tokens):
        shapes.append(tokens.shape)
        return torch.full((*tokens.shape, 330), float("nan"))

    samples, state = Samples("train", corpus, context), torch.get_rng_state()
    samples.draw(model, torch.device("cpu"), Watch(), 1)
    assert samples.prompt == Tokenizer(corpus.tokenizer).decode(corpus.document(0)[1][:known])
    assert shapes == [(1, known + passes)] * passes
    assert places == [(f"token {n} of a sample", n > 0) for n in range(passes)]
    assert torch.equal(torch.get_rng_state(), state)
