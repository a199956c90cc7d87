"""Conversations to text by a chat template, and the turns that a template loses.

A row whose turn is missing from the rendered text would be trained on without it, so every turn is looked for. Preparation
would take 1.5 times as long if every conversation were rendered: a template that is proved to print text unchanged
(`plain_templates.py`) is rendered once per sequence of roles, with placeholders for the text of the messages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_miso.data.plain_templates import prints_content
from trl_miso.data.schema import REASONING, TEMPLATE_ROLES, message_texts

Conversation = list[dict[str, Any]]
Roles = tuple[str, ...]

# Surrounds the number of a message, as a placeholder for its text. Random, so that no data contains it.
_MARK = f"\ue000{token_hex(8)}\ue000"
_NAME = f"x{token_hex(8)}x"  # begins the name of a tool that no data contains
_LONG_ENOUGH = 12  # characters beyond which a text is not found in a rendering by chance


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or with `chat_template` in its place."""

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
            kwargs: The rows' arguments of the template, see `schema.template_kwargs`.
            checked_from: For each conversation the index of the first turn to look for in the rendered text. Without it
                no turn is looked for.
            options: Arguments of `apply_chat_template`.

        Raises:
            ValueError: If the template cannot render a conversation, or leaves out a turn, a role or a tool call.
        """
        options = {"chat_template": self.chat_template, **kwargs, **options}
        template = options["chat_template"] or self.tokenizer.chat_template
        is_plain = isinstance(template, str) and prints_content(template)
        roles = [_plain_roles(conversation) if is_plain else None for conversation in conversations]

        # One call renders a pattern per sequence of roles, and the conversations that no pattern covers.
        with_marks = {sequence: _with_marks(sequence) for sequence in roles if sequence}
        others = [conversation for conversation, sequence in zip(conversations, roles, strict=True) if not sequence]
        rendered = self._apply([*with_marks.values(), *others], template, options)
        patterns = {sequence: text.split(_MARK) for sequence, text in zip(with_marks, rendered, strict=False)}
        other_texts = iter(rendered[len(with_marks) :])

        texts = []
        for i, (conversation, sequence) in enumerate(zip(conversations, roles, strict=True)):
            texts.append(_fill(patterns[sequence], conversation) if sequence else next(other_texts))
            if checked_from is not None and not sequence:
                self._check_turns(conversation, texts[-1], checked_from[i], kwargs, options)
        if checked_from is not None:
            _check_patterns(patterns, dict(zip(roles, conversations, strict=True)))
        return texts

    def lost_reasoning(self, messages: Conversation, text: str, start: int, kwargs: dict[str, Any]) -> bool:
        """Whether the reasoning of a turn from `start` on is missing from the rendered `text`."""
        for i in range(start, len(messages)):
            for part, changed in _reasoning_parts(messages[i]):
                if part in text and len(part) > _LONG_ENOUGH:
                    continue
                if self([[*messages[:i], changed, *messages[i + 1 :]]], kwargs) == [text]:
                    return True
        return False

    def check_tools(self, conversation: Conversation, kwargs: dict[str, Any]) -> None:
        """Raise ValueError if the template leaves out the tools of a row."""
        tools = kwargs.get("tools")
        if tools and self([conversation], kwargs) == self([conversation], kwargs | {"tools": None}):
            raise ValueError(
                f"Got {len(tools)} tools in column 'tools', which the chat template leaves out. Expected a template that renders tools. "
                "Fix: remove the column, or set chat_template_path to another template."
            )

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
        except Exception as error:  # a template's own code can raise anything
            raise ValueError(
                f"Got messages that the chat template cannot render ({type(error).__name__}: {error}), expected roles, an order of "
                "turns and content that it supports. Fix: correct the messages, or set chat_template_path to a template that "
                "accepts them."
            ) from error

    def _check_turns(
        self, messages: Conversation, text: str, start: int, kwargs: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Raise ValueError if a turn from `start` on is missing from `text`.

        A text that is not found may still be there: a template may trim it, or drop thinking. A short text may be found by
        chance, and one that stands in another turn too may be found there. In these cases the turn is rendered with another
        text: if that changes nothing, the turn was left out.
        """
        for message in messages[start:]:
            if isinstance(message.get("content"), list) and str(message["content"]) in text:
                raise ValueError(
                    f"Got content in parts ({message['content']!r:.200}), which the chat template prints as a Python list, expected "
                    "text. Fix: give the content as a string, or set chat_template_path to a template that reads parts."
                )
        parts = [(i, *part) for i, message in enumerate(messages) for part in _changed_texts(message)]
        said = [part for _, part, _ in parts]
        all_found = _stand_in_order(said, text)
        for i, part, changed in parts:
            if i < start:
                continue
            is_telling = len(part) > _LONG_ENOUGH and messages[i]["role"] in TEMPLATE_ROLES
            if is_telling and (all_found or text.count(part) >= sum(other.count(part) for other in said)):
                continue
            if self([[*messages[:i], changed, *messages[i + 1 :]]], kwargs, **options) == [text]:
                raise _turn_left_out(messages[i], part)
        self._check_calls(messages, start, kwargs, options)

    def _check_calls(self, messages: Conversation, start: int, kwargs: dict[str, Any], options: dict[str, Any]) -> None:
        """Raise ValueError if a tool call of a turn from `start` on is missing from a rendering with other names.

        The names themselves are no proof: the tools of the row hold them too.
        """
        renamed: Conversation = []
        names: dict[str, tuple[dict[str, Any], str]] = {}  # other name -> message and own name
        for i, message in enumerate(messages):
            calls = []
            for call in message.get("tool_calls") or []:
                function = call.get("function")
                if i >= start and isinstance(function, dict) and isinstance(function.get("name"), str):
                    other = f"{_NAME}{len(names)}x"
                    names[other] = message, function["name"]
                    call = call | {"function": function | {"name": other}}
                calls.append(call)
            renamed.append(message | {"tool_calls": calls} if calls else message)
        if not names:
            return
        (text,) = self([renamed], kwargs, **options)
        for other, (message, name) in names.items():
            if other not in text:
                raise _turn_left_out(message, name)


def _plain_roles(conversation: Conversation) -> Roles | None:
    """The roles of a conversation whose messages are text that trimming does not change, and nothing else; or None."""
    for message in conversation:
        content = message.get("content")
        if len(message) != 2 or not isinstance(content, str) or not content or content != content.strip():
            return None
    return tuple([message["role"] for message in conversation])


def _with_marks(roles: Roles) -> Conversation:
    """A conversation with these roles whose texts are placeholders."""
    return [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]


def _fill(pattern: list[str], conversation: Conversation) -> str:
    """A rendered text: every second item of a pattern is the number of the message whose text stands there."""
    return "".join([conversation[int(item)]["content"] if i % 2 else item for i, item in enumerate(pattern)])


def _check_patterns(patterns: dict[Roles, list[str]], conversations: dict[Any, Conversation]) -> None:
    """Raise ValueError if a pattern lacks the placeholder of a message."""
    for roles, pattern in patterns.items():
        for i, message in enumerate(conversations[roles]):
            if str(i) not in pattern[1::2]:
                raise _turn_left_out(message, message["content"])


def _turn_left_out(message: dict[str, Any], part: str) -> ValueError:
    return ValueError(
        f"Got a turn of role {message['role']!r:.200} from which the chat template leaves out {part!r:.200}, expected "
        "turns that it renders. Fix: rename the role to one that the template supports, remove the turn, or set "
        "chat_template_path to another template."
    )


def _stand_in_order(parts: Sequence[str], text: str) -> bool:
    """Whether each part stands in `text` behind the one before it."""
    end = 0
    for part in parts:
        place = text.find(part, end)
        if place < 0:
            return False
        end = place + len(part)
    return True


def _changed_texts(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each text of a message, with the message in which that text is replaced by another."""
    content = message.get("content")
    for i, text in enumerate(message_texts(message)):
        if not text.strip():
            continue
        changed: Any = text + " x"
        if isinstance(content, list):
            changed = [*content[:i], content[i] | {"text": changed}, *content[i + 1 :]]
        yield text.strip(), message | {"content": changed}


def _reasoning_parts(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each reasoning of a message, under a key of its own or before `</think>`, with the message in which it is replaced."""
    for name in REASONING:
        text = message.get(name)
        if isinstance(text, str) and text.strip():
            yield text.strip(), message | {name: text + " x"}
    content = message.get("content")
    if message.get("role") == "assistant" and isinstance(content, str) and "</think>" in content:
        text = content.partition("</think>")[0].rpartition("<think>")[2]
        if text.strip():
            yield text.strip(), message | {"content": content.replace(text, text + " x", 1)}
