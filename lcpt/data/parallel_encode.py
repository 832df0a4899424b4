"""Encode documents on several processes, in order, holding only a few batches at a time.

Each worker has a pipe of its own in place of a pool's shared queue: a worker killed while it writes to a shared queue
leaves its lock taken and everybody waiting, whereas a pipe ends with its process.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Hashable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from lcpt.data.errors import DataError
from lcpt.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**20  # of work handed to a process at once
AHEAD = 4  # batches a worker by which the fastest may be ahead of the slowest
Key = TypeVar("Key", bound=Hashable)  # the caller's name for a text
Keyed = tuple[Key, str]
Encoded = tuple[Key, np.ndarray, int, bool]  # key, uint32 [n] with BOS first, bytes of text, exact


def encode_all(documents: Iterable[Keyed[Key]], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded[Key]]:
    """Encode each document, in order; the result does not depend on `workers`. Raises DataError when a worker dies."""
    batches = _batched(documents)
    if workers == 1:
        for batch in batches:
            yield from (_encode(tokenizer, *document) for document in batch)
        return
    context = multiprocessing.get_context("spawn")  # forking is unsafe once a library has started threads
    connections, processes = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(tokenizer.path, theirs), daemon=True)
            process.start()
            theirs.close()  # the worker alone holds its end now, so the pipe ends with it
            connections.append(ours)
            processes.append(process)
        yield from _in_order(batches, connections)
    except (EOFError, OSError):
        raise DataError("a tokenising process died, out of memory perhaps; try fewer --workers") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


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


def _work(tokenizer_path: Path, connection: Connection) -> None:
    """Encode batches in a worker process, until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tidies up alone
    tokenizer = Tokenizer(tokenizer_path)
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


def _encode(tokenizer: Tokenizer, key: Key, text: str) -> Encoded[Key]:
    tokens = tokenizer.encode(text)
    exact = tokenizer.decode(tokens) == text
    return key, np.array([tokenizer.bos_id, *tokens], dtype=np.uint32), len(text.encode()), exact
