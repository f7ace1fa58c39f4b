"""One policy for many threads: what they ask at the same time is decoded side by side."""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.models.chat import Message, render_chat
from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.sampling.moves import newest
from jaxrl_llm.sampling.rows import Row, rows_to_rollout
from jaxrl_llm.sampling.session import Session
from jaxrl_llm.types import Decoding, Params, Rollout


class Reply(NamedTuple):
    """What was asked, what the policy said, and the tokens of both."""

    messages: tuple[Message, ...]
    text: str
    row: Row


class PolicyServer:
    """A policy behind `chat(messages) -> str`, for any number of threads at a time, as a sub-agent or a simulated user.

        with PolicyServer(model, params, key, max_length=2048, max_turn_tokens=256) as server:
            server.chat([{"role": "user", "content": "What is 6 times 7?"}])

    A thread of its own decodes. The same requests get the same replies, in whatever order they come. What was said can
    be trained on: see `take_rollout`.

    Args:
      model: the policy.
      params: its parameters, or a function `() -> (params, version)` that is asked before each few decode steps.
      key: consumed.
      max_length: tokens of a prompt and its reply.
      max_turn_tokens: tokens of a reply.
      tokenizer: the policy's; None for the one that the model carries.
      render: from messages to the prompt; None for the tokenizer's chat template, with a header for the reply.
      stop_sequences: tokens that end a reply; None for the tokenizer's end-of-turn tokens.
      decoding: how tokens are drawn.
      steps: decode steps between two looks for new requests.
      record: whether replies are kept for `take_rollout`.
      session_options: further arguments of `Session`: `num_slots`, `num_pages`, `constraint` and the like.

    Raises:
      ValueError: there is no tokenizer, nothing to render messages with, or what `Session` raises.
    """

    def __init__(
        self,
        model: Model,
        params: Params | Callable[[], tuple[Params, int]],
        key: jax.Array,
        *,
        max_length: int,
        max_turn_tokens: int,
        tokenizer: Tokenizer | None = None,
        render: Callable[[Sequence[Message]], str] | None = None,
        stop_sequences: Sequence[Sequence[int]] | None = None,
        decoding: Decoding = Decoding(),
        steps: int = 8,
        record: bool = True,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("the model carries no tokenizer; give one as tokenizer=")
        if render is None and tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; give render=, a function from messages to a prompt")
        self.tokenizer, self.decoding, self.record = tokenizer, decoding, record
        self._params, self._steps = params, steps
        self._render = render or (lambda messages: render_chat(tokenizer, messages, add_generation_prompt=True))
        self._session = Session(
            model,
            key,
            max_length=max_length,
            max_turn_tokens=max_turn_tokens,
            stop_sequences=[[i] for i in tokenizer.eos_ids] if stop_sequences is None else stop_sequences,
            decoding=decoding,
            **(session_options or {}),
        )
        self._news = threading.Condition()  # guards the four below
        self._requests: list[tuple[list[int], Future[Row]]] = []
        self._replies: list[Reply] = []
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="policy server", daemon=True)

    def __enter__(self) -> PolicyServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def chat(self, messages: Sequence[Message]) -> str:
        """The policy's reply, without the token that ended it. Blocks until it is finished.

        Raises:
          ValueError: what `render_chat` raises, or a prompt that leaves no room.
          RuntimeError: the server is not open, or its policy failed.
        """
        ids = self.tokenizer.encode(self._render(messages))
        future: Future[Row] = Future()
        with self._news:
            if self._closed or not self._thread.is_alive():
                raise RuntimeError("the policy server is not open; use it in a with block") from self._failure
            self._requests.append((ids, future))
            self._news.notify()
        row = future.result()
        said = row.turn_tokens.tolist()
        text = self.tokenizer.decode(said[:-1] if said and said[-1] in self.tokenizer.eos_ids else said)
        if self.record:
            with self._news:
                self._replies.append(Reply(tuple(messages), text, row))
        return text

    def take_rollout(self, reward: Callable[[Reply], float]) -> Rollout:
        """All replies since the last time as a rollout, each of them a group of its own; the record is emptied.

        Args:
          reward: what a reply is paid; NaN for one that cannot be scored.

        Raises:
          ValueError: nothing was said.
        """
        with self._news:
            replies, self._replies = self._replies, []
        if not replies:
            raise ValueError("no reply was recorded since the last time; chat first")
        for reply in replies:
            reply.row.turn_rewards[:] = [float(reward(reply))]
        rows = [reply.row for reply in replies]
        return rows_to_rollout(
            rows,
            decoding=self.decoding,
            group_ids=range(len(rows)),
            constrained=self._session.constraint is not None,
        )

    def _serve(self) -> None:
        """Decodes until the server is closed; whoever waits is told when that, or an error, comes first."""
        waiting: dict[Row, Future[Row]] = {}
        asked: Counter[int] = Counter()  # how often each prompt has come
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._closed or self._requests or waiting)
                    if self._closed:
                        raise RuntimeError("the policy server was closed")
                    requests, self._requests = self._requests, []
                for ids, future in requests:
                    prompt = zlib.crc32(np.asarray(ids, np.int32).tobytes())
                    number = zlib.crc32(asked[prompt].to_bytes(8, "little"), prompt)  # no matter what else was asked
                    asked[prompt] += 1
                    try:
                        waiting[self._session.add(ids, number=number)] = future
                    except ValueError as error:  # of this prompt alone
                        future.set_exception(error)
                params, version = newest(self._params)
                for row in self._session.advance(params, version=version, steps=self._steps):
                    said = tuple(row.turn_tokens.tolist())
                    stopped = any(said[-len(stop) :] == stop for stop in self._session.stops)
                    self._session.finish(row, 0.0, truncated=not stopped)
                    self._session.release(row)
                    waiting.pop(row).set_result(row)
        except BaseException as error:
            with self._news:
                self._closed, self._failure = True, error
                requests, self._requests = self._requests, []
            for future in [*waiting.values(), *(future for _, future in requests)]:
                future.set_exception(RuntimeError(f"the policy server ended: {error}"))
