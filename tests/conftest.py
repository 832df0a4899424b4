"""Provide the fixtures that several folders share."""

import importlib.util
import json
import multiprocessing.connection
import os
import pickle
import random
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tensors are tiny here, and cores are shared


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def call_program(monkeypatch, capsys):
    """call_program(path, *arguments) -> (exit code, stdout, stderr) of a program of this repository, in this
    process."""

    def call(path, *arguments):
        file = Path(__file__).parents[1] / path
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        code = module.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def largest_tensor():
    """A context that records the bytes of the largest tensor that any operation inside it returned."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    self.n_bytes = max(self.n_bytes, x.numel() * x.element_size())
            return result

    return Largest


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(function, world, timeout=60) -> what function() returned on each rank.

    Ranks are forked, with the environment that a launcher sets, so a function may be any closure; what it returns is
    pickled. Where a rank fails, or dies, RuntimeError holds its traceback, and no rank is left behind.
    """
    return _run_ranks


def _run_ranks(function, world, timeout=60):
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks, waiting = [], {}
    for n in range(world):
        reader, writer = context.Pipe(duplex=False)
        ranks.append(context.Process(target=_rank, args=(function, n, world, port, writer)))
        ranks[n].start()
        writer.close()  # before the next fork: a rank's death must close its pipe
        waiting[reader] = n
    results, failures = [None] * world, {}
    deadline = time.monotonic() + timeout
    while waiting and not failures:
        ready = multiprocessing.connection.wait(waiting, max(0, deadline - time.monotonic()))
        if not ready:
            failures = dict.fromkeys(waiting.values(), f"no result after {timeout} s")
        for reader in ready:
            n = waiting.pop(reader)
            try:
                ok, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                ranks[n].join()
                code = ranks[n].exitcode
                ok, value = False, f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
            if ok:
                results[n] = value
            else:
                failures[n] = value
    for process in ranks:
        if failures:
            process.kill()
        process.join()
    if failures:
        raise RuntimeError("\n".join(f"rank {n}: {text}" for n, text in failures.items()))
    return results


def _rank(function, number, world, port, pipe):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        answer = True, function()
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory):
    """make_corpus(seed, tokenizer=None, sentences=…, count=4) -> a prepared folder of so many documents of simple
    sentences."""
    from lcpt.data import prepare

    def make(seed, tokenizer=None, sentences=150, count=4):
        draw = random.Random(seed)
        words = "the a small old river house walked saw under and quickly never green bird sang to of in 12 345".split()
        documents = [
            " ".join(" ".join(draw.choices(words, k=draw.randint(4, 9))).capitalize() + "." for _ in range(sentences))
            for _ in range(count)
        ]
        folder = tmp_path_factory.mktemp("corpus")
        (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents) + "\n")
        prepare([folder / "text.jsonl"], folder / "data", tokenizer=tokenizer, vocab_size=330)
        return folder / "data"

    return make


@pytest.fixture(scope="session")
def train_folder(make_corpus):
    return make_corpus(seed=0)


@pytest.fixture(scope="session")
def valid_folder(make_corpus, train_folder):
    """Other text, the same tokenizer."""
    return make_corpus(seed=1, tokenizer=train_folder / "tokenizer.model", sentences=20)


@pytest.fixture(scope="session")
def tiny_yaml(train_folder, tmp_path_factory):
    """A small experiment without run.dir and valid_path: 256 tokens a step, 8 sequences of 32."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(f"""
data: {{path: {train_folder}, context: 32}}
model:
  n_layers: 2
  d_model: 32
  n_heads: 2
  n_kv_heads: 1
  vocab_size: 330
  attention: {{pattern: [polysketch, softmax], block_size: 8, polysketch: {{size: 8}}}}
training:
  max_steps: 6
  warmup_steps: 2
  global_batch_tokens: 256
  lr: 0.003
  valid_every_steps: 4
  valid_tokens: 256
""")
    return path
