"""Fingerprint of the model behind a response file, so that stale responses are never reused."""

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from transformers.utils.hub import cached_file, extract_commit_hash

# The files of a model's folder that its responses depend on.
_MODEL_FILES = (
    *("*.safetensors*", "pytorch_model*", "adapter_model*", "*config.json", "*.py"),
    *("tokenizer*", "vocab*", "merges*", "*.model", "*tokens*.json", "*chat_template*"),
)


def model_fingerprint(model: str, backend: str, base_url: str | None) -> str | None:
    """Tell models of the same name apart; None if only the name is known.

    The fingerprint is per kind of model:

    - of a server: a digest of its address without credentials and query;
    - of a folder: a digest of the names, sizes and modification times of its model files;
    - of an id on the Hub: the commit that is loaded.

    Raises:
        OSError: If the Hub has no such model.
        ValueError: If there is no such folder.
    """
    if backend == "openai":
        address = urlsplit(base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        host = address.netloc.rpartition("@")[2]
        return f"server {_digest((address.scheme, host, address.path.rstrip('/')))}"
    folder = Path(model)
    if folder.is_dir():
        files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
        stats = [(file.name, file.stat()) for file in files]
        return f"folder {_digest((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)}"
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"Got no folder {model}, expected a model's folder or an id on the Hub. Fix: correct --model.")
    config = cached_file(
        model,
        "config.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    commit = extract_commit_hash(config, None)
    return None if commit is None else f"commit {commit}"


def _digest(parts: Iterable[object]) -> str:
    return sha256(repr(list(parts)).encode()).hexdigest()[:16]
