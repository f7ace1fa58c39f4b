"""A policy with tools: the environment that plays a protocol of `envs.tool_protocols` against `tools`, for
`sampling.host_rollout`."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jaxrl_llm.envs.tool_protocols import Call, Malformed, Protocol
from jaxrl_llm.models.chat import Message, render_chat, text_behind_turn
from jaxrl_llm.models.tokenizer import Tokenizer, stop_sequences
from jaxrl_llm.sampling.calls import in_thread
from jaxrl_llm.tools.tool import Tool, ToolResult, call_tool, call_tool_async, check_tools, tool_schema
from jaxrl_llm.types import Span

logger = logging.getLogger(__name__)


class Turn(NamedTuple):
    """A turn of the policy and what became of it.

    Attributes:
      text: all that the policy wrote, the token that ended the turn included.
      actions: its calls and its malformed attempts.
      answer: what it said instead, or None.
      results: one for each action; `error` says what was wrong with the action, or with carrying it out.
      observation: what the policy was shown, before the sampler cut it to its limit.
    """

    text: str
    actions: tuple[Call | Malformed, ...]
    answer: str | None
    results: tuple[ToolResult, ...]
    observation: str


class Trajectory(NamedTuple):
    """An episode as a reward sees it: every text with its author. It is also the state of the environment."""

    task: Any
    prompt: str
    turns: tuple[Turn, ...] = ()

    @property
    def answer(self) -> str | None:
        """What the policy said in its last turn, if that was no action. No tool has written any of it."""
        return self.turns[-1].answer if self.turns else None

    @property
    def errors(self) -> list[str]:
        """Kinds of errors, as in `ToolResult.error`, one for each action that had one."""
        return [result.error for turn in self.turns for result in turn.results if result.error is not None]

    @property
    def num_calls(self) -> int:
        """Calls that could be read, whether or not they were carried out."""
        return sum(isinstance(action, Call) for turn in self.turns for action in turn.actions)

    @property
    def spans(self) -> list[Span]:
        """The whole text by author."""
        spans = [Span("prompt", self.prompt)]
        for turn in self.turns:
            spans += [Span("policy", turn.text), Span("observation", turn.observation)]
        return [span for span in spans if span.text]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolEnv:
    """A `HostEnv` whose policy calls tools, until it gives an answer.

    With a tokenizer that has a chat template, prompts and observations are what the template writes around the
    policy's turns; without one they are plain text. Whatever the policy does wrong it is shown, and `reward` can see.
    The words of tools and users cannot end a turn: special tokens and the protocol's own words are broken by a space in
    them. Nothing is remembered between calls, so that a turn may be tried again; tools should bear being called twice.

    Attributes:
      protocol: see `envs.tool_protocols`.
      tokenizer: the policy's.
      reward: `reward(trajectory) -> float` of a finished episode, plain (run in a thread) or async. NaN says that it
        cannot be scored, and so does an exception, which is logged. Turns before the last one have reward 0.
      tools: what may be called.
      ask: from a task to the question: a text, or with a chat template messages.
      system: a system message.
      user: `user(trajectory) -> text`, plain or async, answers a turn that is no call; None ends the episode. Without a
        user the first such turn ends it.
      max_calls: calls of an episode. A further one is not carried out, and the policy is told so.
      call_timeout: seconds for one call; None leaves it to the sampler's `CallLimits`, which cover the whole turn, and
        whose messages are no part of any protocol.
      chat: whether to use the chat template; None if there is one.

    Raises:
      ValueError: tools that collide or that the protocol cannot call, `chat` without a template, a template that
        `text_behind_turn` cannot use, or a number out of range.
    """

    protocol: Protocol
    tokenizer: Tokenizer
    reward: Callable[[Trajectory], Any]
    tools: Sequence[Tool] = ()
    ask: Callable[[Any], str | Sequence[Message]] = str
    system: str = ""
    user: Callable[[Trajectory], Any] | None = None
    max_calls: int | None = None
    call_timeout: float | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        check_tools(self.tools)
        if self.max_calls is not None and self.max_calls < 0:
            raise ValueError(f"max_calls must be at least 0 or None, got {self.max_calls}")
        if self.call_timeout is not None and not self.call_timeout > 0:
            raise ValueError(f"call_timeout must be positive seconds or None, got {self.call_timeout}")
        if self.chat and self.tokenizer.chat_template is None:
            raise ValueError("chat=True needs a tokenizer with a chat template; leave chat out, or give it a template")
        self.protocol.instructions(self.tools)
        self.protocol.parse("", self.tools)
        if self._templated:
            self._observe("", (ToolResult("", None),), None)

    async def reset(self, task: Any) -> tuple[Trajectory, str]:
        """The trajectory without turns, and the prompt."""
        prompt = self._prompt(self.ask(task))
        return Trajectory(task, prompt), prompt

    async def step(self, state: Trajectory, turn_text: str) -> tuple[Trajectory, str, float, bool]:
        """Carries out what a turn asks for: the trajectory with this turn, the observation, the reward (0 before the
        end), and whether the episode is over."""
        parsed = self.protocol.parse(self._body(turn_text), self.tools)
        results: list[ToolResult] = []
        spent = state.num_calls
        for action in parsed.actions:  # one after the other, as a call may build on the one before it
            results.append(await self._carry_out(action, spent))
            spent += isinstance(action, Call)
        turn = Turn(turn_text, parsed.actions, parsed.answer, tuple(results), "")
        ended = state._replace(turns=(*state.turns, turn))
        reply = None
        if parsed.answer is not None:
            reply = await _run(self.user, ended) if self.user else None
            if reply is None:
                return ended, "", await self._score(ended), True
            if not isinstance(reply, str):
                raise ValueError(f"user must return a text, or None to end the episode, got {reply!r:.200}")
        observation = self._observe(turn_text, turn.results, reply)
        turn = turn._replace(observation=observation)
        return state._replace(turns=(*state.turns, turn)), observation, 0.0, False

    def render_error(self, message: str) -> str:
        """For the option of that name of `sampling.host_rollout`: what is shown where a whole step failed, as when a
        user does not answer. It supposes that the policy had ended its turn."""
        end = self._ends[0] if self._ends and self._templated and not self.protocol.inline else ""
        return self._observe(end, (ToolResult(f"Error: {message}", "failed"),), None)

    @cached_property
    def stop_sequences(self) -> list[list[int]]:
        """Tokens that end a turn, for the sampler."""
        texts = self.protocol.stops(self.tools) if self.protocol.inline or not self._templated else ()
        return [[i] for i in self.tokenizer.eos_ids] + stop_sequences(self.tokenizer, texts)

    @property
    def _templated(self) -> bool:
        return self.tokenizer.chat_template is not None if self.chat is None else self.chat

    @property
    def _template_tools(self) -> list[dict[str, Any]] | None:
        """The tools, where the template is to present them and their results."""
        template = self.tokenizer.tool_template or self.tokenizer.chat_template or ""
        native = self._templated and self.protocol.role == "tool" and re.search(r"\btools\b", template)
        return [tool_schema(tool) for tool in self.tools] if native and self.tools else None

    def _prompt(self, question: str | Sequence[Message]) -> str:
        schemas = self._template_tools
        instructions = "" if schemas else self.protocol.instructions(self.tools)
        if not self._templated:
            if not isinstance(question, str):
                raise ValueError(f"without a chat template ask must give a text, got {question!r:.200}")
            return _paragraphs(self.system, instructions, self.protocol.question.format(question))
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if instructions:  # with the first question, as some templates have no place for a system message
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
            if first is None:
                raise ValueError(f"ask must give a message of the user, got {messages!r:.200}")
            content = _paragraphs(instructions, str(messages[first]["content"]))
            messages[first] = {**messages[first], "content": content}
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return render_chat(self.tokenizer, messages, tools=schemas, add_generation_prompt=True)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.decode([i]) for i in self.tokenizer.eos_ids)

    def _body(self, turn_text: str) -> str:
        """The turn without what ended it: an end-of-turn token, or the first words of the observation."""
        body = turn_text
        for end in self._ends:
            body = body.removesuffix(end)
        opening = self.protocol.opening.strip()
        stripped = body.rstrip()
        return stripped.removesuffix(opening) if opening and stripped.endswith(opening) else body

    async def _carry_out(self, action: Call | Malformed, spent: int) -> ToolResult:
        if isinstance(action, Malformed):
            return ToolResult(action.problem, "malformed")
        name, arguments = action
        if self.max_calls is not None and spent >= self.max_calls:
            return ToolResult(f"Error: all {self.max_calls} calls are spent. Answer without another.", "over_budget")
        chosen = check_tools(self.tools).get(name)
        try:
            async with asyncio.timeout(self.call_timeout):
                if chosen is None or inspect.iscoroutinefunction(chosen.call):
                    return await call_tool_async(self.tools, name, arguments)
                return await in_thread(call_tool, self.tools, name, arguments)
        except TimeoutError:
            return ToolResult(f"Error: {name} did not answer within {self.call_timeout:g} seconds.", "timeout")

    def _observe(self, turn_text: str, results: Sequence[ToolResult], reply: str | None) -> str:
        """The text that stands between this turn and the next one."""
        protocol, ended = self.protocol, turn_text.endswith(self._ends) if self._ends else False
        schemas = self._template_tools
        if schemas and reply is None:
            new = [{"role": "tool", "content": self._quote(result.text)} for result in results]
            return text_behind_turn(self.tokenizer, new, ended=ended, tools=schemas)
        if reply is not None:
            parts = [protocol.reply.format(self._quote(reply))]
        else:
            frames = [protocol.correction if result.error == "malformed" else protocol.result for result in results]
            parts = [frame.format(self._quote(result.text)) for frame, result in zip(frames, results, strict=True)]
        text = "\n".join(parts)
        if self._templated and (ended or reply is not None or not protocol.inline):
            new = [{"role": "user", "content": text.strip()}]
            return text_behind_turn(self.tokenizer, new, ended=ended, tools=schemas)
        opened = bool(protocol.opening.strip()) and turn_text.rstrip().endswith(protocol.opening.strip())
        return ("" if opened else protocol.opening) + text + protocol.closing

    def _quote(self, text: str) -> str:
        """`text` with a space in what would read as a special token or as the protocol's own words."""
        special = "|".join(re.escape(token) for token in self.tokenizer.special_ids if token)
        return re.sub("|".join(filter(None, [self.protocol.quoted, special])), lambda m: f"{m[0][:1]} {m[0][1:]}", text)

    async def _score(self, trajectory: Trajectory) -> float:
        try:
            return float(await _run(self.reward, trajectory))
        except Exception:
            # shown to the policy as an error of its own it would be trained on as a failure
            logger.exception("the reward of task %.200r failed: not scorable", trajectory.task)
            return math.nan


async def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a plain or an async function returns, without holding up the event loop."""
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    return await in_thread(function, *arguments)


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
