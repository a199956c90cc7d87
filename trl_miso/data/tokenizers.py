"""Tokenizers that preparation can use, and copies of them that render and end rows as they should be trained."""

from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trl_miso.data.schema import message_without_nulls, without_nulls


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without transformers' chat templates and special tokens, such as that of mistral-common."""
    if not isinstance(tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast):
        raise ValueError(
            f"Got a tokenizer of class {type(tokenizer).__name__}, expected a PreTrainedTokenizer or PreTrainedTokenizerFast, whose chat "
            "template transformers renders. Fix: pass processing_class=AutoTokenizer.from_pretrained(model, mistral_format=False), "
            "which reads the tokenizer.json of the same repository, and a chat template (chat_template_path) if it has none."
        )


def without_added_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that ends no text with an eos token: preparation adds it to whole rows of plain text alone."""
    if not _adds_eos(tokenizer):
        return tokenizer
    other = deepcopy(tokenizer)
    adds_bos = other("a").input_ids[0] == other.bos_token_id
    if other.is_fast:
        other.add_bos_token, other.add_eos_token = adds_bos, False
    else:
        other.build_inputs_with_special_tokens = _WithPrefix([other.bos_token_id] if adds_bos else [])
    if _adds_eos(other):
        raise ValueError(
            f"Got a tokenizer of class {type(tokenizer).__name__} that ends every text with an eos token, a prompt too, also with "
            "add_eos_token=False. Expected one that adds none. Fix: pass a PreTrainedTokenizerFast of the same vocabulary."
        )
    return other


@dataclass(frozen=True)
class _WithPrefix:
    """`build_inputs_with_special_tokens` of a tokenizer written in Python: `prefix` and the ids of one text."""

    prefix: list[int]

    def __call__(self, ids: list[int], pair: None = None) -> list[int]:
        return [*self.prefix, *ids]


def _adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids, text = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return ids[-1] == tokenizer.eos_token_id and ids[-len(text) :] != text


def rendering_no_nulls(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose chat template does not see null keys: Arrow gives all dicts of a column the keys of each."""
    other = copy(tokenizer)
    other.apply_chat_template = _WithoutNulls(tokenizer)
    return other


@dataclass(frozen=True)
class _WithoutNulls:
    """`tokenizer.apply_chat_template` of one conversation, tools and template arguments without null keys."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            list(map(message_without_nulls, conversation)), **without_nulls(kwargs)
        )
