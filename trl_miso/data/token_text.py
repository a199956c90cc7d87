"""The text that each token stands for, for whoever shows tokens one by one."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token says by itself: spaces kept, parts of a character as bytes."""
    texts = {i: _text(i, tokenizer) for i in set(ids)}
    return [texts[i] for i in ids]


def _text(i: int, tokenizer: PreTrainedTokenizerBase) -> str:
    token = tokenizer.convert_ids_to_tokens(i) or ""
    text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
    if "\u2581" in token and "\u2581" not in text:
        return token.replace("\u2581", " ")  # decoding strips the space that a text begins with
    if "\ufffd" in text and all(char in _BYTES for char in token):
        said = bytes(_BYTES[char] for char in token)
        try:
            return said.decode()  # the replacement character itself, or a byte by its name
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in said)
    return text
