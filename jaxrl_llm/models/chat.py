"""Conversations to token ids through a tokenizer's chat template, with a mask of what the assistant produced.

A conversation is a list of messages, dicts with a `role` and a `content` (or `tool_calls`), as in the chat interfaces
of OpenAI and Hugging Face. Templates run in the sandboxed Jinja environment of `transformers`.

For training on demonstrations there is `encode_chat`. While sampling, text is never encoded again: encoding what was
decoded may give other ids than were sampled, and the probabilities of those belong to nothing. `extend_chat` puts the
ids of the next messages behind the sampled ones as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.models.tokenizer import Tokenizer

Message = Mapping[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation.

    Args:
      tokenizer: gives the template, where `template` is None, and the special tokens that templates name.
      messages: at least one.
      tools: JSON schemas of functions, which the template presents to the model.
      template: a Jinja template, in place of the tokenizer's own.
      add_generation_prompt: ends with the header of an assistant's turn, for the model to go on from.

    Raises:
      ValueError: there is no template, a message is malformed, or the template fails on the messages.
    """
    _check_messages(messages, "messages")
    return _render(tokenizer, messages, tools, template, add_generation_prompt)[0]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is the assistant's: its content, its tool calls and the
    token that ends its turn, in every turn of it; not the header before nor the white space behind.

    The ids are those of the whole text encoded once. A token belongs to whom its first character belongs to: one that
    begins in the header, as when a line break of the header merges with one that the content begins with, could not be
    sampled behind it and is not in the mask.

    A template that marks the assistant's part with `{% generation %}` is followed. With any other, a turn is the
    difference between the conversation up to it, with the generation prompt, and the conversation with it. That needs
    a template that appends: one that rewrites earlier turns, as Qwen3's does when it strips their reasoning once a
    user's message follows, is refused. Encode such a conversation turn by turn, as the model saw it.

    Raises:
      ValueError: as `render_chat`; or the template has no `{% generation %}` and rewrites earlier turns.
    """
    _check_messages(messages, "messages")
    text, spans = _render(tokenizer, messages, tools, template, False)
    if not _GENERATION.search(_choose_template(tokenizer, tools, template)):
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_find_turn(tokenizer, text, messages, i, tools, template) for i in turns]
    ids, places = tokenizer.encode_with_spans(text)
    return ids, [any(start <= place < end for start, end in spans) for place, _ in places]


def extend_chat(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    mask: Sequence[bool],
    before: Sequence[Message],
    new: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    add_generation_prompt: bool = True,
) -> tuple[list[int], list[bool]]:
    """A sampled conversation with further messages behind it, the ids so far untouched.

    Args:
      tokenizer: as in `render_chat`, and so are `tools` and `template`.
      ids: the conversation so far: a prompt and what was sampled after it, with or without an end-of-turn token.
      mask: for each of `ids` whether the policy sampled it.
      before: the messages that `ids` stand for, the last of them the assistant's. Only what the template writes around
        that one matters here, so its content need not read as `ids` exactly.
      new: the messages to append, of a tool or a user.
      add_generation_prompt: also append the header of the assistant's next turn.

    Returns:
      `ids` and `mask`, each with the new part behind it. The mask is false in that part; an end-of-turn token that was
      missing, as after a turn cut off by its limit, is in it.

    Raises:
      ValueError: as `render_chat`; lengths differ; the last of `before` is not the assistant's or one of `new` is; the
        template rewrites earlier turns when `new` follows, or ends turns with no special token.
    """
    _check_messages(before, "before")
    _check_messages(new, "new")
    if len(ids) != len(mask) or not ids:
        raise ValueError(f"ids and mask must be of one length and not empty, got {len(ids)} and {len(mask)}")
    if before[-1]["role"] != "assistant":
        raise ValueError(f"the last message of before must be the assistant's, got role {before[-1]['role']!r}")
    for i, message in enumerate(new):
        if message["role"] == "assistant":
            raise ValueError(f"new[{i}] is the assistant's; sample it, or encode the whole with encode_chat")
    closed = _render(tokenizer, before, tools, template, False)[0]
    full = _render(tokenizer, [*before, *new], tools, template, add_generation_prompt)[0]
    _check_prefix(closed, full, f"the {len(before)} messages of before, once new ones follow,")
    end, token = _end_of_turn(tokenizer, closed, 0, len(closed))
    if not token:
        raise ValueError(
            f"the template ends the assistant's turn with no special token, but with {closed[-20:]!r}, so what belongs "
            "behind sampled ids is unknown; use a template whose turns end with one of the tokenizer's special tokens"
        )
    # The new text always stands behind that special token, so it is encoded behind it: a token may swallow white space
    # to its right, and a SentencePiece model puts a space before a text's first word only.
    tail = tokenizer.encode(token + full[end:])
    if ids[-1] in (tokenizer.special_ids[token], *tokenizer.eos_ids):
        tail = tail[1:]
    return [*ids, *tail], [*mask, *[False] * len(tail)]


def text_behind_turn(
    tokenizer: Tokenizer,
    new: Sequence[Message],
    *,
    ended: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
) -> str:
    """What the template writes behind a turn of the assistant, up to where its next turn begins: the messages `new`
    and the headers around them. It is taken from a conversation of one user's message and one turn, so a template that
    would rewrite earlier turns has nothing to rewrite: what was sampled stays as it was.

    Args:
      ended: whether the turn has its end-of-turn token; otherwise the text begins with that token.

    Raises:
      ValueError: as `render_chat`; or the template ends turns with no special token.
    """
    _check_messages(new, "new")
    mark = "(the turn)"
    while any(mark in str(message) for message in [*new, tools]):
        mark += "*"
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    tail = _render(tokenizer, [*turn, *new], tools, template, True)[0].partition(mark)[2]
    token = next((token for token in tokenizer.special_ids if token and tail.lstrip().startswith(token)), None)
    if token is None:
        raise ValueError(
            f"behind the assistant's turn the template writes {tail[:20]!r} and no special token, so where a sampled "
            "turn ends is unknown; use a template whose turns end with one of the tokenizer's special tokens"
        )
    behind = tail.lstrip().removeprefix(token)
    return behind if ended else token + behind


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    template: str | None,
    add_generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans of it that `{% generation %}` blocks wrote, if the template has them."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _choose_template(tokenizer, tools, template)
    # Some interfaces write absent fields as None, which templates would print; transformers drops them too.
    conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
    marked = _GENERATION.search(template) is not None
    names: dict[str, Any] = dict(tokenizer.names)
    try:
        rendered: Any = render_jinja_template(
            [conversation],
            tools=None if tools is None else [dict(tool) for tool in tools],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template fails on {len(messages)} messages with roles "
            f"{[message['role'] for message in messages]}: {error}; change the messages or give another template"
        ) from error
    (text,), spans = rendered
    return text, spans[0] if marked else []


def _choose_template(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None, template: str | None) -> str:
    """The given template, or else the tokenizer's."""
    own = tokenizer.tool_template if tools and tokenizer.tool_template else tokenizer.chat_template
    if (chosen := template or own) is None:
        raise ValueError("the tokenizer has no chat template; give one as template=, a Jinja text")
    return chosen


def _check_messages(messages: Sequence[Message], name: str) -> None:
    """Raises a ValueError that names the message which is not one."""
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(f"{name} must be a list of at least one message, got {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{name}[{i}] must be a dict with role and content, got {message!r}")
        if not isinstance(role := message.get("role"), str) or not role:
            raise ValueError(f"{name}[{i}] must have a role such as 'user', got {role!r}")
        content, calls = message.get("content"), message.get("tool_calls")
        if content is None and not calls:
            raise ValueError(f"{name}[{i}] ({role}) has neither content nor tool_calls; an empty content is ''")
        if content is not None and not isinstance(content, str | list):
            raise ValueError(
                f"{name}[{i}] ({role}) must have a content that is a string or a list of parts, got {content!r}"
            )


def _find_turn(
    tokenizer: Tokenizer,
    text: str,
    messages: Sequence[Message],
    index: int,
    tools: Sequence[Mapping[str, Any]] | None,
    template: str | None,
) -> tuple[int, int]:
    """Where in `text`, the whole conversation, the assistant's message `index` lies."""
    prompt = _render(tokenizer, messages[:index], tools, template, True)[0]
    closed = _render(tokenizer, messages[: index + 1], tools, template, False)[0]
    _check_prefix(prompt, closed, f"the prompt of messages[{index}], once the message itself follows,")
    _check_prefix(closed, text, f"messages[{index}], once later messages follow,")
    return len(prompt), _end_of_turn(tokenizer, text, len(prompt), len(closed))[0]


def _check_prefix(part: str, whole: str, what: str) -> None:
    """Raises a ValueError where `whole` does not begin with `part`."""
    if not whole.startswith(part):
        same = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            f"the template renders {what} differently: {part[same : same + 40]!r} becomes {whole[same : same + 40]!r}; "
            "encode the conversation turn by turn, or give a template= that appends or has {% generation %} blocks"
        )


def _end_of_turn(tokenizer: Tokenizer, text: str, start: int, end: int) -> tuple[int, str]:
    """Where the turn in `text[start:end]` ends, without the white space that a template puts behind the turn's last
    special token, and that token; `end` and an empty string where none closes the turn."""
    found = ((text.rfind(token, start, end), len(token), token) for token in tokenizer.special_ids if token)
    place, length, token = max(found, default=(-1, 0, ""))
    if place < 0 or text[place + length : end].strip():
        return end, ""
    return place + length, token
