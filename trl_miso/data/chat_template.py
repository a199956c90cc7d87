"""Conversations to text by a chat template, and whether a turn got lost on the way.

Rendering would be half of the time of preparing rows. Where a template is proved to print text as it is, one rendering
serves all conversations with the same roles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from secrets import token_hex
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_miso.data.contexts import TEMPLATE_ROLES, message_texts
from trl_miso.data.templates import prints_content

Conversation = list[dict[str, Any]]

_MARK = f"\ue000{token_hex(8)}\ue000"  # around the number of a message whose text is to stand there; in no data


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or with another in its place."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None

    def __call__(
        self,
        conversations: Sequence[Conversation],
        kwargs: dict[str, Any],
        checked_from: Sequence[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """Equal to `tokenizer.apply_chat_template(conversations, tokenize=False, **kwargs, **options)`.

        Args:
            conversations: Lists of messages.
            kwargs: What rows give their template.
            checked_from: For each conversation the turn from which on, at least, all are looked for; by default none are.
            options: Arguments of `apply_chat_template`.

        Raises:
            ValueError: If the template cannot render a conversation, or passes over a turn (a role or a call) of one.
        """
        options = {"chat_template": self.chat_template, **kwargs, **options}
        template = options["chat_template"] or self.tokenizer.chat_template
        prints = isinstance(template, str) and prints_content(template)
        roles = [_roles(conversation) if prints else None for conversation in conversations]
        marked = {known: _marked(known) for known in roles if known}
        others = [conversation for conversation, known in zip(conversations, roles, strict=True) if not known]
        rendered = self._apply([*marked.values(), *others], template, options)
        patterns = {known: text.split(_MARK) for known, text in zip(marked, rendered, strict=False)}
        rest = iter(rendered[len(marked) :])
        texts = []
        for i, (conversation, known) in enumerate(zip(conversations, roles, strict=True)):
            texts.append(_filled(patterns[known], conversation) if known else next(rest))
            if checked_from is not None and not known:
                self._check_turns(conversation, texts[-1], checked_from[i], kwargs, options)
        if checked_from is not None:
            _check_patterns(patterns, dict(zip(roles, conversations, strict=True)))
        return texts

    def _apply(self, conversations: list[Conversation], template: Any, options: dict[str, Any]) -> list[str]:
        if not conversations:
            return []
        if not template:
            raise ValueError(
                "Got rows of messages and a tokenizer without a chat template, expected one that renders them. Fix: set "
                "chat_template_path to a .jinja file or to a model whose template is to be used."
            )
        try:
            return self.tokenizer.apply_chat_template(conversations, tokenize=False, **options)
        except Exception as error:  # whatever a template's own code raises
            raise ValueError(
                f"Got messages that the chat template cannot render ({type(error).__name__}: {error}), expected roles, an order of "
                "turns and content that it knows. Fix: correct the messages, or set chat_template_path to a template that takes "
                "them."
            ) from error

    def _check_turns(
        self, messages: Conversation, text: str, start: int, kwargs: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """What a turn says is looked for. Where it is not found (a template may also trim it, or drop thinking), or could be
        there by chance, another rendering shows whether it makes a difference."""
        at = 0
        for i, message in islice(enumerate(messages), start, None):
            if isinstance(message.get("content"), list) and str(message["content"]) in text:
                raise ValueError(
                    f"Got content in parts ({message['content']!r:.200}), which the chat template prints as a Python list, expected "
                    "text. Fix: give the content as a string, or set chat_template_path to a template that reads parts."
                )
            for said, other in _otherwise(message):
                found = text.find(said, at)
                at = found + len(said) if found >= 0 else at
                if (found >= 0 or said in text) and message["role"] in TEMPLATE_ROLES and len(said) > 12:
                    continue
                if self([[*messages[:i], other, *messages[i + 1 :]]], kwargs, **options) == [text]:
                    raise _left_out(message, said)


def _roles(conversation: Conversation) -> tuple[str, ...] | None:
    """The roles of a conversation that has nothing else but text, which trimming would not change."""
    for message in conversation:
        content = message.get("content")
        if len(message) != 2 or not isinstance(content, str) or not content or content != content.strip():
            return None
    return tuple([message["role"] for message in conversation])


def _marked(roles: Sequence[str]) -> Conversation:
    return [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]


def _filled(pattern: list[str], conversation: Conversation) -> str:
    """Every other item of a pattern is the number of a message."""
    return "".join([conversation[int(part)]["content"] if i % 2 else part for i, part in enumerate(pattern)])


def _check_patterns(patterns: dict[tuple[str, ...], list[str]], conversations: dict[Any, Conversation]) -> None:
    for roles, pattern in patterns.items():
        for i, message in enumerate(conversations[roles]):
            if str(i) not in pattern[1::2]:
                raise _left_out(message, message["content"])


def _left_out(message: dict[str, Any], said: str) -> ValueError:
    return ValueError(
        f"Got a turn of role {message['role']!r:.200} from which the chat template leaves out {said!r:.200}, expected "
        "turns that it renders. Fix: rename the role to one that the template knows, remove the turn, or set "
        "chat_template_path to another template."
    )


def _otherwise(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each thing that a message says, with the message saying something else instead."""
    content = message.get("content")
    for i, text in enumerate(message_texts(message)):
        if text.strip():
            other = text + " x"
            parts = isinstance(content, list) and [*content[:i], content[i] | {"text": other}, *content[i + 1 :]]
            yield text.strip(), message | {"content": parts or other}
    calls = message.get("tool_calls") or []
    for i, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            other = call | {"function": function | {"name": function["name"] + "x"}}
            yield function["name"], message | {"tool_calls": [*calls[:i], other, *calls[i + 1 :]]}
