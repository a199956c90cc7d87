"""Settings of SFTTrainer that the tokenizer or the rows do not allow: the trainer and preview refuse them in the same words."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational


def check_tokens(args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse special tokens that the vocabulary lacks.

    Args:
        args: The `MISOSFTConfig`. Its `chat_template_path` may add a pad token, which is then not checked.

    Raises:
        ValueError: If the eos or the pad token is unknown, or if there is neither.
    """
    if not pad_token(args, tokenizer):
        raise ValueError(
            "Got a tokenizer with neither a pad nor an eos token, expected one of them, to pad with. Fix: set pad_token or "
            "eos_token of the tokenizer or of the config."
        )
    if args.eos_token is not None:
        check_token(tokenizer, "eos_token", args.eos_token)
    if args.chat_template_path is None:
        check_token(tokenizer, "pad_token", pad_token(args, tokenizer))


def pad_token(args: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The pad token that SFTTrainer chooses; TRL 2.0 removes that of `args`."""
    return getattr(args, "pad_token", None) or tokenizer.pad_token or args.eos_token or tokenizer.eos_token


def check_token(tokenizer: PreTrainedTokenizerBase, name: str, token: str | None) -> None:
    """Refuse a token that the vocabulary lacks."""
    if token not in tokenizer.get_vocab():
        raise ValueError(f"Got {name}={token!r}, expected a token of the vocabulary. Fix: correct {name}.")


def check_rows(args: Any, row: dict[str, Any]) -> None:
    """Refuse settings that do not fit the rows, of which `row` is the first.

    Raises:
        ValueError: For rows with images, for `assistant_only_loss` without conversations, and for `padding_free` without
            packing, in which TRL would not enforce `max_length`.
    """
    if "image" in row or "images" in row:
        raise ValueError(
            "Got rows with images, expected text alone: MISO trains on text. Fix: remove the columns 'image' and 'images'."
        )
    if args.assistant_only_loss and not is_conversational(row):
        raise ValueError(
            "Got assistant_only_loss=True and rows that are not conversations, expected messages. Fix: leave "
            "assistant_only_loss out, or convert the rows."
        )
    if args.padding_free and not args.packing and args.max_length is not None:
        raise ValueError(
            f"Got padding_free=True without packing and max_length={args.max_length}, which TRL does not enforce then. Expected "
            "packing=True or max_length=None. Fix: leave padding_free out, since MISO's batches have no padding."
        )
