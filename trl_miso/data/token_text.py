"""The text that each single token stands for, to show tokens one by one."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token: spaces are kept, incomplete characters are shown as bytes, `<0xF0>`."""
    texts = {i: _text(i, tokenizer) for i in set(ids)}
    return [texts[i] for i in ids]


def _text(i: int, tokenizer: PreTrainedTokenizerBase) -> str:
    token = tokenizer.convert_ids_to_tokens(i) or ""
    text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
    if "\u2581" in token and "\u2581" not in text:
        return token.replace("\u2581", " ")  # decoding strips a leading space
    if "\ufffd" in text and all(char in _BYTES for char in token):
        raw = bytes(_BYTES[char] for char in token)
        try:
            return raw.decode()  # the token is the replacement character itself, or the name of a byte
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in raw)
    return text
