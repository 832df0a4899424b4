"""Encode documents on several processes, in order, holding only a few batches at a time.

Each worker has a pipe of its own in place of a pool's shared queue: a worker killed while it writes to a shared queue
leaves its lock taken and everybody waiting, whereas a pipe ends with its process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Hashable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from lcpt.data.errors import DataError
from lcpt.data.open_tokenizer import AnyTokenizer, open_tokenizer

BATCH_CHARACTERS = 2**20  # of work handed to a process at once
AHEAD = 4  # batches a worker by which the fastest may be ahead of the slowest
Key = TypeVar("Key", bound=Hashable)  # the caller's name for a text
Keyed = tuple[Key, str]
Encoded = tuple[Key, np.ndarray, int, bool]  # key, uint32 [n] with BOS first, bytes of text, exact


def encode_all(documents: Iterable[Keyed[Key]], tokenizer: AnyTokenizer, workers: int) -> Iterator[Encoded[Key]]:
    """Encode each document, in order; the result does not depend on `workers`. Raises DataError when a worker dies."""
    batches = _batched(documents)
    if workers == 1:
        for batch in batches:
            yield from (_encode(tokenizer, *document) for document in batch)
        return
    connections, processes = [], []
    try:
        for _ in range(workers):
            ours, theirs = Pipe()
            processes.append(_start(tokenizer.path, theirs))
            theirs.close()  # the worker alone holds its end now, so the pipe ends with it
            connections.append(ours)
        yield from _in_order(batches, connections)
    except (EOFError, OSError):
        raise DataError("a tokenising process died, out of memory perhaps; try fewer --workers") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(tokenizer: Path, connection: Connection) -> subprocess.Popen:
    """Start a worker, in a new process that runs none of the caller's program: multiprocessing would import the
    caller's main module, which a script without a guard, a notebook or standard input do not allow."""
    code = f"from {__name__} import work; work(*__import__('sys').argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    number = connection.fileno()
    command = [sys.executable, "-c", code, str(tokenizer), str(number)]
    return subprocess.Popen(command, env=environment, pass_fds=[number], stdin=subprocess.DEVNULL)


def _in_order(batches: Iterator[list[Keyed[Key]]], connections: list[Connection]) -> Iterator[Encoded[Key]]:
    """Hand each batch to an idle worker; results wait in `done` for their turn."""
    idle = list(connections)
    busy: dict[Connection, int] = {}  # the number of the batch that its worker encodes
    done: dict[int, list[Encoded[Key]]] = {}
    turn = sent = 0
    while True:
        while idle and sent - turn < AHEAD * len(connections) and (batch := next(batches, None)):
            idle[-1].send(batch)
            busy[idle.pop()] = sent
            sent += 1
        if not busy:
            return
        for connection in cast(list[Connection], wait(list(busy))):
            done[busy.pop(connection)] = connection.recv()
            idle.append(connection)
        while turn in done:
            yield from done.pop(turn)
            turn += 1


def work(tokenizer_path: str, number: str) -> None:
    """Encode batches in a worker process, until the parent closes the pipe, of that file descriptor, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tidies up alone
    tokenizer, connection = open_tokenizer(tokenizer_path), Connection(int(number))
    try:
        while True:
            connection.send([_encode(tokenizer, *document) for document in connection.recv()])
    except (EOFError, ConnectionError):
        return


def _batched(documents: Iterable[Keyed[Key]]) -> Iterator[list[Keyed[Key]]]:
    batch: list[Keyed[Key]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: AnyTokenizer, key: Key, text: str) -> Encoded[Key]:
    tokens = tokenizer.encode(text)
    exact = tokenizer.decode(tokens) == text
    return key, np.array([tokenizer.bos_id, *tokens], dtype=np.uint32), len(text.encode()), exact
