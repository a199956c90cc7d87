"""Rows as they are measured: the full prompt with its parts, the contexts that training would make, and an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from trl_miso.config import MISOSFTConfig
from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.contexts import Prompt, RowDropped, full_row, message_texts, parallel_row, template_kwargs
from trl_miso.data.tokenization import RowTokenizer, Tokenized
from trl_miso.report.prompt_parts import Prompted, read_prompt

ConstraintCheck = Callable[[dict[str, Any], str], Sequence[bool | None] | None]


@dataclass(frozen=True)
class Sample:
    """A row's full prompt and answer, and its contexts, by name, with what they mix with.

    `answer` is the token ids that the model predicts, `text` what they say; `head` what the output begins with before them.
    `alone` are the prompts with one constraint each, in their order.
    """

    index: int
    row: dict[str, Any]
    constraints: list[str]
    prompted: Prompted
    alone: list[Prompted]
    answer: list[int]
    text: str
    contexts: list[list[int]]
    names: list[str]
    weights: list[float]
    head: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest context, or the full prompt, and the answer."""
        contexts = (len(context) + len(self.head) for context in self.contexts)
        return max(len(self.prompted.ids), *contexts) + len(self.answer)

    def answered(self, answer: list[int], text: str) -> "Sample":
        """With an answer, token ids and what they say."""
        return replace(self, answer=answer, text=text)

    def followed(self, check: ConstraintCheck | None) -> list[bool | None]:
        """Whether the answer follows each constraint; None where nothing can tell."""
        said = check({**self.row, "constraints": self.constraints}, self.text) if check and self.constraints else None
        if said is None:
            return [None] * len(self.constraints)
        if len(said) != len(self.constraints):
            raise ValueError(
                f"Got {len(said)} verdicts on {len(self.constraints)} constraints (row {self.index}), expected one for each, in their "
                "order. Fix: correct the check."
            )
        return list(said)


@dataclass(frozen=True)
class Sampler:
    """Makes samples of raw rows, with the contexts that training with `args` would give them.

    Args:
        tokenizer: With the chat template that is to be used.
        args: `include_full`, `include_bare`, `full_context_weight`, `response_template` and `max_length` are read.
        kind: `"constraints"` or `"contexts"`, see `trl_miso.data.contexts.row_format`.
        own_answers: Whether the model is to answer (`measure.answer_by_itself`): samples have no answer yet, and whole prompts.
    """

    tokenizer: PreTrainedTokenizerBase
    args: MISOSFTConfig
    kind: str
    own_answers: bool = False

    def __call__(self, row: dict[str, Any], index: int) -> Sample:
        """Raises RowDropped for a row that carries nothing to measure, or in which a part cannot be told."""
        template, kwargs = self.args.response_template, template_kwargs(row)
        full = full_row(row, self.kind, template)
        constraints = [c for c in row.get("constraints") or [] if c.strip()] if self.kind == "constraints" else []
        if self.kind == "constraints" and not constraints:
            raise RowDropped("no constraints")
        base = _base(row["prompt"], template) if constraints else None
        singles = self._singles(row, constraints)
        prompted = read_prompt(self.tokenizer, full.contexts[0], base, constraints, template, kwargs)
        alone = [
            read_prompt(self.tokenizer, single, base, [constraint], template, kwargs)
            for single, constraint in zip(singles, constraints, strict=True)
        ]
        made = parallel_row(row, self.kind, self.args.include_full, self.args.include_bare, template, full)
        tokenize = RowTokenizer(self.tokenizer, response_template=template)
        whole, tokenized = map(_kept, tokenize([full, made], [kwargs] * 2))
        head, answer, text = _unlabelled(tokenized), whole.output[len(_unlabelled(whole)) :], _said(full.completion)
        if self.own_answers:
            head, answer, text = self._prompt_ids(made.contexts[0], kwargs)[len(tokenized.contexts[0]) :], [], ""
        else:  # the end of the prompt may not be that of a conversation with this answer (thinking, merged tokens)
            cut = len(prompted.ids) + len(answer) - len(whole.contexts[0] + whole.output)
            prompted, *alone = (one.without_last(cut) for one in (prompted, *alone))
            assert prompted.ids + answer == whole.contexts[0] + whole.output, "offsets are of other tokens"
        return self.fitting(
            Sample(
                index=index,
                row=row,
                constraints=constraints,
                prompted=prompted,
                alone=alone,
                answer=answer,
                text=text,
                contexts=tokenized.contexts,
                names=self._names(singles, full.contexts[0], made.contexts),
                weights=made.weights or self._weights(len(tokenized.contexts)),
                head=head,
            )
        )

    def fitting(self, sample: Sample) -> Sample:
        """`sample`. Raises RowDropped if it is longer than `max_length`: a part of an answer follows nothing."""
        if self.args.max_length is not None and sample.longest > self.args.max_length:
            raise RowDropped(f"more tokens than max_length={self.args.max_length}")
        return sample

    def _prompt_ids(self, prompt: Prompt, kwargs: dict[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        (text,) = ChatRenderer(self.tokenizer)([prompt], kwargs, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _singles(self, row: dict[str, Any], constraints: list[str]) -> list[Prompt]:
        """The prompts with one constraint each."""
        alone = [row | {"constraints": [constraint], "full_prompt": None} for constraint in constraints]
        return [full_row(one, self.kind, self.args.response_template).contexts[0] for one in alone]

    def _names(self, singles: list[Prompt], full: Prompt, contexts: list[Prompt]) -> list[str]:
        if self.kind == "contexts":
            return ["full" if context == full else f"context {i}" for i, context in enumerate(contexts, start=1)]
        named = [(full, "full"), *((context, f"constraint {i}") for i, context in enumerate(singles, start=1))]
        return [next((name for known, name in named if known == context), "bare") for context in contexts]

    def _weights(self, n: int) -> list[float]:
        share = self.args.full_context_weight
        return [1 / n] * n if share is None or n == 1 else [share] + [(1 - share) / (n - 1)] * (n - 1)


def _kept(tokens: Tokenized | RowDropped) -> Tokenized:
    if isinstance(tokens, RowDropped):
        raise tokens
    return tokens


def _unlabelled(tokens: Tokenized) -> list[int]:
    """What the output begins with before its labels."""
    return [token for token, label in zip(tokens.output, tokens.labels, strict=True) if label == -100]


def _base(prompt: Prompt, response_template: str | None) -> str:
    """The base instruction as it stands before constraints."""
    if isinstance(prompt, list):
        return cast(str, prompt[-1]["content"])
    at = prompt.rfind(response_template) if response_template else -1
    return prompt[:at] if at >= 0 else prompt


def _said(completion: Prompt) -> str:
    """What an answer says: its last turn."""
    return completion if isinstance(completion, str) else "\n".join(message_texts(completion[-1]))
