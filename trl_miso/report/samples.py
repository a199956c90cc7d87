"""Rows in the form in which they are measured: the full prompt with its parts, the contexts of training, and an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.contexts import full_row, parallel_row, split_row, with_constraints
from trl_miso.data.layout import context_weights
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import Prompt, RowDropped, constraints_of, message_texts, template_kwargs
from trl_miso.data.tokenization import RowTokenizer, Tokenized
from trl_miso.report.prompt_parts import PromptParts, read_prompt, response_start

# Called with a row and an answer: one verdict per constraint (None: unknown), or None for a row without a check.
ConstraintCheck = Callable[[dict[str, Any], str], Sequence[bool | None] | None]


@dataclass(frozen=True)
class Sample:
    """A row's full prompt, its answer, and its contexts.

    Attributes:
        index: The row's number in its dataset.
        row: The raw row.
        constraints: The texts of the row's constraints.
        prompted: The full prompt.
        alone: For each constraint the prompt with this constraint only.
        answer: The token ids that the model predicts.
        text: The answer as text.
        contexts: The token ids of each context.
        names: The name of each context, see `ContextRow`.
        weights: The weight of each context.
        head: The token ids with which the output begins before the answer.
    """

    index: int
    row: dict[str, Any]
    constraints: list[str]
    prompted: PromptParts
    alone: list[PromptParts]
    answer: list[int]
    text: str
    contexts: list[list[int]]
    names: list[str]
    weights: list[float]
    head: list[int]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest path: a context or the full prompt, and the answer."""
        contexts = (len(context) + len(self.head) for context in self.contexts)
        return max(len(self.prompted.ids), *contexts) + len(self.answer)

    def answered(self, answer: list[int], text: str) -> "Sample":
        """The sample with another answer, as token ids and as text."""
        return replace(self, answer=answer, text=text)

    def followed(self, check: ConstraintCheck | None) -> list[bool | None]:
        """Whether the answer follows each constraint; None where no check exists."""
        verdicts = None
        if check and self.constraints:
            verdicts = check({**self.row, "constraints": self.constraints}, self.text)
        if verdicts is None:
            return [None] * len(self.constraints)
        if len(verdicts) != len(self.constraints):
            raise ValueError(
                f"Got {len(verdicts)} verdicts on {len(self.constraints)} constraints (row {self.index}), expected one per "
                "constraint, in the order of the constraints. Fix: correct the check."
            )
        return list(verdicts)


@dataclass(frozen=True)
class Sampler:
    """Turns raw rows into samples, with the contexts that training with the same options would make.

    Args:
        tokenizer: With the chat template to use.
        options: `include_full`, `include_bare`, `full_context_weight`, `response_template` and `max_length` are read.
        kind: `"constraints"` or `"contexts"`, see `trl_miso.data.schema.row_format`.
        own_answers: Leave the answer to the model (`measure.generate_answer`): samples have an empty answer, and their prompts
            end as for generation.
    """

    tokenizer: PreTrainedTokenizerBase
    options: DataOptions
    kind: str
    own_answers: bool = False

    def __call__(self, row: dict[str, Any], index: int) -> Sample:
        """Turn a row into a sample.

        Raises:
            RowDropped: If the row has nothing to measure, a part cannot be located, or the sample is longer than `max_length`.
        """
        template, kwargs = self.options.response_template, template_kwargs(row)
        tokenize = RowTokenizer(self.tokenizer, response_template=template)
        for name in ("prompt", "full_prompt"):
            if isinstance(row.get(name), str):
                row = row | {name: tokenize.without_bos(row[name])}
        if isinstance(row.get("contexts"), list) and all(isinstance(context, str) for context in row["contexts"]):
            row = row | {"contexts": list(map(tokenize.without_bos, row["contexts"]))}
        full = full_row(row, self.kind, self.options)
        constraints = constraints_of(row) if self.kind == "constraints" else []
        if self.kind == "constraints" and not constraints:
            raise RowDropped("no constraints")

        # The full prompt, and the prompts with one constraint each.
        base, prompts = None, []
        if constraints:
            split = split_row(row, self.options)
            if split.obstacle:
                raise RowDropped(split.obstacle)
            base = _base_instruction(split.bare, template)
            prompts = [with_constraints(split.bare, [constraint], template) for constraint in constraints]
        prompted = read_prompt(self.tokenizer, full.contexts[0], base, constraints, template, kwargs)
        alone = [
            read_prompt(self.tokenizer, prompt, base, [constraint], template, kwargs)
            for prompt, constraint in zip(prompts, constraints, strict=True)
        ]

        # The contexts, and the answer after the full prompt and after the contexts.
        mixed = parallel_row(row, self.kind, self.options, full)
        one_context, tokenized = (_unless_dropped(tokens) for tokens in tokenize([full, mixed], [kwargs] * 2))
        if self.own_answers:
            head = prompt_ids(self.tokenizer, mixed.contexts[0], kwargs)[len(tokenized.contexts[0]) :]
            answer, text = [], ""
        else:
            head = _before_labels(tokenized)
            answer = one_context.output[len(_before_labels(one_context)) :]
            text = _last_text(full.completion)
            # A prompt may end in other tokens than a conversation with this answer has there (thinking, merged tokens).
            ids = one_context.contexts[0] + one_context.output
            cut = len(prompted.ids) + len(answer) - len(ids)
            prompted, *alone = (prompt.without_last(cut) for prompt in (prompted, *alone))
            assert prompted.ids + answer == ids, "the tokens with offsets are not those of training"

        weights = mixed.weights or context_weights(len(tokenized.contexts), self.options.full_context_weight)
        return self.check_length(
            Sample(
                index=index,
                row=row,
                constraints=constraints,
                prompted=prompted,
                alone=alone,
                answer=answer,
                text=text,
                contexts=tokenized.contexts,
                names=list(mixed.names),
                weights=weights,
                head=head,
            )
        )

    def check_length(self, sample: Sample) -> Sample:
        """Return the sample if it fits.

        Raises:
            RowDropped: If it is longer than `max_length`: a cut answer could not be checked against the constraints.
        """
        if self.options.max_length is not None and sample.longest > self.options.max_length:
            raise RowDropped(f"more tokens than max_length={self.options.max_length}")
        return sample


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, kwargs: dict[str, Any]) -> list[int]:
    """Token ids of a prompt as standard inference reads it: text as it is, messages with the generation prompt."""
    if isinstance(prompt, str):
        return tokenizer(RowTokenizer(tokenizer).without_bos(prompt))["input_ids"]
    (text,) = ChatRenderer(tokenizer)([prompt], kwargs, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _unless_dropped(tokens: Tokenized | RowDropped) -> Tokenized:
    if isinstance(tokens, RowDropped):
        raise tokens
    return tokens


def _before_labels(tokens: Tokenized) -> list[int]:
    """The tokens of the output that carry no label: those before the answer."""
    return [token for token, label in zip(tokens.output, tokens.labels, strict=True) if label == -100]


def _base_instruction(prompt: Prompt, response_template: str | None) -> str:
    """The base instruction, without a response template that follows it."""
    if isinstance(prompt, str):
        return prompt[: response_start(prompt, response_template)]
    return cast(str, prompt[-1]["content"])


def _last_text(completion: Prompt) -> str:
    """The text of an answer's last turn."""
    return completion if isinstance(completion, str) else "\n".join(message_texts(completion[-1]))
