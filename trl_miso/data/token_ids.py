"""Many texts to token ids at once: what texts have in common is tokenized once."""

import re
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Characters tokenized per call: the tokenizer's record of each token takes a hundred times the memory of the text.
_CHARACTERS = 2_000_000


def token_ids(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[str]], add_special_tokens: bool
) -> Iterator[list[list[int]]]:
    """Token ids of each row's texts.

    Equals the tokenizer on each text. The texts of a row share most of their content: they are cut at special tokens,
    and each distinct piece is tokenized once.
    """
    cut = _keep_whole if add_special_tokens else _cutter(tokenizer)
    pieces = {text: cut(text) for text in chain.from_iterable(rows)}
    unique = list(dict.fromkeys(chain.from_iterable(pieces.values())))
    ids: dict[str, list[int]] = {}
    for run in _runs(unique, _CHARACTERS):
        ids |= zip(run, _encode(tokenizer, run, add_special_tokens), strict=True)
    joined = {text: list(chain.from_iterable(map(ids.__getitem__, parts))) for text, parts in pieces.items()}
    for texts in rows:
        yield [joined[text] for text in texts]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Equal to `tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]`.

    Where the tokenizers library does all the work, its fast call skips the character offsets of every token: a
    fifth of the time on long texts.
    """
    kind, fast = type(tokenizer), PreTrainedTokenizerFast
    if any(getattr(kind, name) is not getattr(fast, name, None) for name in ("__call__", "_encode_plus")):
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]
    tokenizer("")  # resets truncation and padding of the backend
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def _cutter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[str]]:
    """A function that cuts text before special tokens, where both sides can be tokenized apart with the same result.

    The tokenizers library splits off added tokens first, the leftmost and longest match, so that text on both sides of
    one is never tokenized together. Tokens that strip whitespace or match within words are not cut at.
    """
    added = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
    contents = sorted((t.content for t in added if not t.normalized), key=len, reverse=True)
    borders = {t.content for t in added if t.special and not t.lstrip}
    if not contents or any(t.single_word for t in added):
        return _keep_whole
    search = re.compile("|".join(map(re.escape, contents))).finditer

    def cut(text: str) -> list[str]:
        cuts = [0, *(match.start() for match in search(text) if match[0] in borders), len(text)]
        return [text[start:end] for start, end in pairwise(cuts)]

    return cut


def _keep_whole(text: str) -> list[str]:
    return [text]


def _runs(texts: list[str], size: int) -> Iterator[list[str]]:
    """Consecutive texts in groups, each closed by the text with which it reaches `size` characters."""
    run, length = [], 0
    for text in texts:
        run.append(text)
        length += len(text)
        if length >= size:
            yield run
            run, length = [], 0
    if run:
        yield run
