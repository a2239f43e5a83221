"""Another engine in a process of its own: its threads are not among those of this one, and it may crash."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from anee_core.errors import ModelError

Run = Callable[[Tensor, int, Any], None]
"""A function that takes token ids [1, T], a number of new tokens, and a streamer that gets prompt and tokens."""
Start = Callable[[], Run]
"""A function that loads what was prepared into an engine, and returns what runs it."""


class OwnProcess:
    """A `Run` that another process does, which ends with this one.

    Args:
        start: called there, to return what runs; it can be pickled.

    Raises:
        ModelError: the process ended instead.
    """

    def __init__(self, start: Start) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(start, theirs), daemon=True).start()
        theirs.close()
        self._wait()

    def __call__(self, prompt: Tensor, count: int, streamer: Any) -> None:
        """Generate there, and hand on what comes."""
        self._pipe.send((prompt.tolist(), count))
        while (tokens := self._wait()) is not None:
            streamer.put(torch.tensor(tokens))

    def _wait(self) -> list[Any] | None:
        """Return what comes next: the prompt, tokens, or None at the end."""
        try:
            tokens: list[Any] | None = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise ModelError("its process ended before it was done; what it wrote above may say why") from error
        return tokens


class _Teller:
    """A streamer that sends away what it gets."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def put(self, tokens: Tensor) -> None:
        """Send the tokens."""
        self._pipe.send(tokens.tolist())


def _serve(start: Start, pipe: Connection) -> None:
    """Do what is asked for until nobody is there to ask."""
    run = start()
    pipe.send(None)
    while True:
        try:
            prompt, count = pipe.recv()
        except EOFError:
            return
        run(torch.tensor(prompt), count, _Teller(pipe))
        pipe.send(None)
