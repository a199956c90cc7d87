"""Where the answer of a rendered conversation begins.

A chat template renders a prompt (with its generation prompt) and the whole conversation. Usually the first is the beginning
of the second, and the answer is the rest. Some templates render the end of a prompt differently once it is answered.
"""

from collections.abc import Callable
from typing import Any

from trl_miso.data.schema import REASONING, RowDropped
from trl_miso.segments import common_prefix

_MARK = "\ue001"
NOT_CONTAINED = "the chat template renders the prompt differently once it is answered"


def answer_start(before: str, prompt: str, whole: str, answer_at: Callable[[], int], end: Callable[[], int]) -> int:
    """The index in `whole` at which the answer begins, behind the assistant's header.

    Args:
        before: The rendered prompt. prompt: The same with the generation prompt. whole: The rendered conversation.
        answer_at: Returns an index in `whole` behind the header and at most at the beginning of the answer's content.
        end: Returns the index in `before` at which the last message ends.

    Raises:
        RowDropped: If the conversation does not begin with the prompt up to the end of its last message.
    """
    if whole.startswith(prompt):
        return len(prompt)
    begin = common_prefix(before, whole)
    if begin < len(before) and begin < end():
        raise RowDropped(NOT_CONTAINED)
    # The header is what the generation prompt and the text before the content have in common: all of it, wherever it
    # stands, or else the longest beginning of it.
    header = prompt[common_prefix(before, prompt) :]
    content = max(answer_at(), begin)
    if (whole_header := whole.rfind(header, begin, content)) >= 0:
        return whole_header + len(header)
    stretch = whole[begin:content]
    matches = [common_prefix(header, stretch[i:]) for i in range(len(stretch))]
    longest = max(matches, default=0)
    return begin + matches.index(longest) + longest if longest else content


def changed_end(message: dict[str, Any]) -> dict[str, Any] | None:
    """The message with another end of its text, or None if it has no text."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return message | {"content": content.rstrip() + _MARK}
    if isinstance(content, list) and content:
        return message | {"content": [*content[:-1], content[-1] | {"text": content[-1]["text"].rstrip() + _MARK}]}
    return None


def changed_start(message: dict[str, Any]) -> dict[str, Any]:
    """The message with another beginning of each of its texts and of its first tool's name."""
    changed = dict(message)
    for name in ("content", *REASONING):
        if isinstance(message.get(name), str) and message[name].strip():
            changed[name] = _MARK + message[name].lstrip()
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and content:
        changed["content"] = [content[0] | {"text": _MARK + content[0]["text"].lstrip()}, *content[1:]]
    if calls and isinstance(calls[0].get("function"), dict):
        function = calls[0]["function"]
        changed["tool_calls"] = [calls[0] | {"function": function | {"name": f"x{function.get('name')}"}}, *calls[1:]]
    return changed
