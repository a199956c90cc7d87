"""Contexts and completion to token ids, and the boundary between contexts and output.

The first token of the answer must be predicted from a *mixed* state, so the output has to begin before it. The output
begins with tokens that all contexts end with and that carry no label: the generation prompt that the chat template adds
(the assistant header), `response_template` in plain text, or the last token of the prompt. With one context, context +
output is token for token what SFTTrainer trains on.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from trl_miso.data.boundary import answer_start, changed_end, changed_start
from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.contexts import ContextRow
from trl_miso.data.schema import Prompt, RowDropped
from trl_miso.data.token_ids import token_ids
from trl_miso.data.tokenizers import check_tokenizer
from trl_miso.segments import common_prefix

LOST_REASONING = "the chat template leaves out the reasoning of the answer"
OTHER_END = "the prompt of inference ends in text that training does not have"
NO_END = "no label ends the answer's turn, so that the model may not learn to stop"


@dataclass
class Tokenized:
    """Token ids of n >= 1 contexts and of their common output, with a label per output token (-100: no loss).

    `turn` is the length of the output up to the token that ends its turn: templates may add tokens after the last turn.
    `notes` say what the user should know about a row that is kept.
    """

    contexts: list[list[int]]
    output: list[int]
    labels: list[int]
    turn: int | None = None
    notes: tuple[str, ...] = ()


class _Rendered(NamedTuple):
    """The texts of a row.

    Attributes:
        whole: Context and completion. before: The first context up to the output.
        start: `whole` up to where the completion begins. prompts: Each context with the generation prompt.
    """

    whole: str
    before: str
    start: str
    prompts: Sequence[str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowTokenizer:
    """Renders and tokenizes many rows at a time.

    Args:
        tokenizer: With a chat template if rows are conversational.
        chat_template: Used instead of the tokenizer's own.
        response_template: Text with which the output of plain-text rows begins, e.g. `"\\n### Response:\\n"`.
        assistant_only_loss: Label only the tokens inside the template's `{% generation %}` markers.
        chat: Whether rows are conversational; if None, the rows of each call decide.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    response_template: str | None = None
    assistant_only_loss: bool = False
    chat: bool | None = None

    def __call__(
        self, rows: Sequence[ContextRow], template_kwargs: Sequence[dict[str, Any]]
    ) -> list[Tokenized | RowDropped]:
        """Tokenize rows with one call of the tokenizer. A row from which nothing can be learned becomes its `RowDropped`.

        Args:
            template_kwargs: For each row the arguments of the chat template, see `schema.template_kwargs`.

        Raises:
            ValueError: If the contexts of a row share no beginning of the output, or the chat template leaves out a turn.
        """
        check_tokenizer(self.tokenizer)
        rendered = self._render(rows, template_kwargs)
        is_plain_text = bool(rows) and isinstance(rows[0].completion, str)
        kept = [texts for texts in rendered if isinstance(texts, _Rendered)]
        ids = token_ids(self.tokenizer, [[t.whole, t.before, t.start, *t.prompts] for t in kept], is_plain_text)
        end_ids, blank = self.end_ids(), dict[int, bool]()
        results: list[Tokenized | RowDropped] = []
        for row, kwargs, texts in zip(rows, template_kwargs, rendered, strict=True):
            if isinstance(texts, RowDropped):
                results.append(texts)
                continue
            try:
                tokenized = self._assemble(row, kwargs, next(ids))
            except RowDropped as reason:
                results.append(reason)
                continue
            no_end = [NO_END] if lacks_end(tokenized.labels, end_ids) else []
            tokenized.notes = (*row.notes, *texts.notes, *no_end)
            tokenized.turn = self._turn(tokenized.output, end_ids, blank)
            results.append(tokenized)
        return results

    def check(self, whole: Prompt, prompt: Prompt | None, kwargs: dict[str, Any]) -> None:
        """Check a row that TRL will tokenize.

        Args:
            whole: The whole row, prompt and completion.
            prompt: The prompt alone, if the row has one.
            kwargs: The row's arguments of the chat template.

        Raises:
            RowDropped: If `assistant_only_loss` is set and there is no assistant turn; as `__call__`.
            ValueError: As `__call__`.
        """
        self._check_kinds({isinstance(whole, list)})
        if not isinstance(whole, list):
            self._check_eos()
            return
        if self.assistant_only_loss and all(message["role"] != "assistant" for message in whole):
            raise RowDropped("no output: the conversation has no assistant turn")
        (text,) = self._chat([whole], kwargs, checked_from=[0])
        self._chat.check_tools(whole, kwargs)
        last = len(whole) - 1
        if prompt is not None:
            last = len(prompt)
            (before,) = self._chat([cast(list, prompt)], kwargs)
            (with_header,) = self._chat([cast(list, prompt)], kwargs, add_generation_prompt=True)
            self._answer_start(whole, last, before, with_header, text, kwargs)
        if whole[last]["role"] == "assistant" and self._chat.lost_reasoning(whole, text, last, kwargs):
            raise RowDropped(LOST_REASONING)
        if self.assistant_only_loss:
            self._assistant_mask(whole, kwargs)

    @property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self.chat_template)

    def _render(
        self, rows: Sequence[ContextRow], template_kwargs: Sequence[dict[str, Any]]
    ) -> list[_Rendered | RowDropped]:
        kinds = {isinstance(row.completion, list) for row in rows}
        self._check_kinds(kinds)
        if True in kinds:
            return self._render_chat(rows, template_kwargs)
        return [self._render_text(row) for row in rows]

    def _check_kinds(self, kinds: set[bool]) -> None:
        if len(kinds | {self.chat} - {None}) > 1:
            raise ValueError(
                "Got rows of plain text and rows of messages in one dataset, expected one kind: only plain text gets special "
                "tokens added. Fix: convert one to the other."
            )

    def _render_chat(
        self, rows: Sequence[ContextRow], template_kwargs: Sequence[dict[str, Any]]
    ) -> list[_Rendered | RowDropped]:
        rendered: list[_Rendered | RowDropped] = []
        # Neighbouring rows with equal template arguments are rendered in three calls: whole rows, beginnings, prompts.
        for kwargs, group in groupby(zip(rows, template_kwargs, strict=True), key=itemgetter(1)):
            members = [row for row, _ in group]
            whole_rows, beginnings, prompts, first_unchecked = [], [], [], []
            for row in members:
                contexts = cast(list[list], row.contexts)
                whole_rows.append(contexts[0] + cast(list, row.completion))
                beginnings.append(contexts[0])
                prompts += contexts
                # The whole row is checked, and so are the turns that a context has in common with its first context.
                first_unchecked += [common_prefix(context, contexts[0]) for context in contexts]
            whole_texts = self._chat(whole_rows, kwargs, checked_from=[0] * len(members))
            self._chat.check_tools(whole_rows[0], kwargs)
            beginning_texts = self._chat(beginnings, kwargs)
            prompt_texts = iter(self._chat(prompts, kwargs, first_unchecked, add_generation_prompt=True))
            for row, messages, whole, before in zip(members, whole_rows, whole_texts, beginning_texts, strict=True):
                own_prompts = list(islice(prompt_texts, len(row.contexts)))
                try:
                    rendered.append(self._rendered(row, messages, whole, before, own_prompts, kwargs))
                except RowDropped as reason:
                    rendered.append(reason)
        return rendered

    def _rendered(
        self,
        row: ContextRow,
        messages: list[dict[str, Any]],
        whole: str,
        before: str,
        prompts: list[str],
        kwargs: dict[str, Any],
    ) -> _Rendered:
        """The texts of a conversation. Raises RowDropped if its prompt or its reasoning is not in them."""
        size = len(row.contexts[0])
        start = self._answer_start(messages, size, before, prompts[0], whole, kwargs)
        if self._chat.lost_reasoning(messages, whole, size, kwargs):
            raise RowDropped(LOST_REASONING)
        if whole.startswith(prompts[0]):
            return _Rendered(whole, before, prompts[0], prompts)
        lost = prompts[0][common_prefix(prompts[0], whole) :]
        return _Rendered(whole, before, whole[:start], prompts, (f"{OTHER_END}: {lost!r:.60}",))

    def _answer_start(
        self,
        messages: list[dict[str, Any]],
        size: int,
        before: str,
        prompt: str,
        whole: str,
        kwargs: dict[str, Any],
    ) -> int:
        """`boundary.answer_start` of a conversation whose first `size` messages are the prompt."""

        def answer_at() -> int:
            changed = [*messages[:size], changed_start(messages[size]), *messages[size + 1 :]]
            return common_prefix(whole, self._chat([changed], kwargs)[0])

        def end() -> int:
            last = changed_end(messages[size - 1])
            if last is None:
                return len(before)
            (changed,) = self._chat([[*messages[: size - 1], last]], kwargs)
            return len(before) - common_prefix(before[::-1], changed[::-1])

        return answer_start(before, prompt, whole, answer_at, end)

    def _render_text(self, row: ContextRow) -> _Rendered:
        self._check_eos()
        eos = self.tokenizer.eos_token
        completion, contexts = cast(str, row.completion), list(map(self.without_bos, cast(list[str], row.contexts)))
        whole = contexts[0] + completion
        if not completion.endswith(eos):
            whole += eos
        return _Rendered(whole, self._before_response(contexts), contexts[0], contexts)

    def without_bos(self, text: str) -> str:
        """Plain text without the beginning-of-sequence token that the tokenizer adds itself."""
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos) and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            return text[len(bos) :]
        return text

    def _turn(self, output: list[int], end_ids: set[int], blank: dict[int, bool]) -> int:
        """The length of an output up to the first of the special tokens, apart from white space, with which it ends.

        `blank` remembers which tokens are white space.
        """
        turn = len(output)
        for i in range(len(output) - 1, 0, -1):
            token = output[i]
            if token in end_ids:
                turn = i + 1
                continue
            if token not in blank:
                blank[token] = not self.tokenizer.decode(token).strip()
            if not blank[token]:
                break
        return turn

    def end_ids(self) -> set[int]:
        """The tokens that can end a turn: special ones."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)} - {None}

    def _check_eos(self) -> None:
        if not self.tokenizer.eos_token:
            raise ValueError(
                "Got rows of plain text and a tokenizer without an eos token, expected one: the model learns from it where to "
                "stop. Fix: set eos_token, of the tokenizer or in the config."
            )

    def _before_response(self, prompts: list[str]) -> str:
        """The first prompt up to the response template, with which all prompts must end."""
        first = prompts[0]
        if self.response_template is None:
            return first
        start = first.rfind(self.response_template)
        for prompt in prompts:
            if start < 0 or not prompt.endswith(first[start:]):
                raise ValueError(
                    f"Got a prompt that ends with {prompt[-100:]!r}, expected every prompt and context to end with "
                    f"response_template {self.response_template!r}. Fix: correct response_template, or end the prompts with it."
                )
        return first[:start]

    def _assemble(self, row: ContextRow, kwargs: dict[str, Any], ids: list[list[int]]) -> Tokenized:
        """Find the boundary between contexts and output in a row's token ids."""
        whole, before, answer_start, *prompts = ids
        first = prompts[0]
        # 1. The completion begins where its beginning and the whole row diverge, as in TRL: tokens may merge across it.
        completion_start = common_prefix(answer_start, whole)
        if completion_start == 0:
            raise RowDropped("an empty context")
        # 2. The output begins with what the first prompt has after `before` (the generation prompt), and with at least one
        #    token, from which the first token of the completion is predicted.
        head = len(first) - min(common_prefix(before, whole), completion_start - 1)
        # 3. It has only tokens that all prompts end with: the last character of a context may merge into the first token
        #    that follows, as in ".\n\n" + "### Response:".
        for prompt in prompts[1:]:
            head = common_prefix(first[: -head - 1 : -1], prompt[: -head - 1 : -1])
        start = len(first) - head
        if start > min(common_prefix(first, whole), completion_start - 1):
            raise self._no_common_head(prompts, max(len(first) - completion_start, 0) + 1, row)
        contexts = [prompt[: len(prompt) - head] for prompt in prompts]
        if len(contexts) > 1 and not all(contexts):
            raise RowDropped("an empty context")
        # 4. Only the completion carries labels.
        labels = [-100] * (completion_start - start) + whole[completion_start:]
        if self.assistant_only_loss:
            mask = self._assistant_mask(cast(list, row.contexts[0]) + cast(list, row.completion), kwargs)[start:]
            labels = [label if keep else -100 for label, keep in zip(labels, mask, strict=True)]
        return Tokenized(contexts, whole[start:], labels)

    def _assistant_mask(self, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> list[int]:
        options = {"chat_template": self.chat_template, **kwargs}
        mask = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )["assistant_masks"]
        if 1 not in mask:
            raise ValueError(
                "Got assistant_only_loss=True and a conversation in which the chat template marks no token as the assistant's, expected some. "
                "Fix: use a chat template with {% generation %} markers, or set assistant_only_loss=False."
            )
        return mask

    def _no_common_head(self, prompts: list[list[int]], length: int, row: ContextRow) -> ValueError:
        ends = list(dict.fromkeys(self.tokenizer.decode(prompt[-length:]) for prompt in prompts))
        if isinstance(row.completion, str):
            fix = "set response_template to text with which every prompt ends, e.g. '\\n### Response:\\n'"
        else:
            fix = "use a chat template whose generation prompt is the same after every context"
        return ValueError(
            f"Got contexts that end differently: {ends}. Expected the tokens before the completion to be common to all "
            f"contexts, since the output begins with them. Fix: {fix}."
        )


def lacks_end(labels: list[int], end_ids: Set[int]) -> bool:
    """Whether some tokens are labelled, but not all, and none of the last labels can end a turn."""
    labelled = [label for label in labels if label != -100]
    return 0 < len(labelled) < len(labels) and end_ids.isdisjoint(labelled[-3:])
