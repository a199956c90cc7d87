"""NLTK's data: looked for before a checker needs them, since NLTK would try to download them or fail in the middle of a score."""

from collections.abc import Mapping
from importlib import import_module
from zipfile import BadZipFile

_FILES = {
    "punkt_tab": "tokenizers/punkt_tab/english/",
    "stopwords": "corpora/stopwords/english",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng/averaged_perceptron_tagger_eng.weights.json",
}


def require_nltk_data(uses: Mapping[str, str]) -> None:
    """Look for NLTK's data by the names of `uses`, whose values say what needs them.

    Raises:
        ValueError: If some are missing or unreadable. The message names all of them, and one command that gets them.
    """
    nltk = import_module("nltk")
    names, found = [], []
    for name in uses:
        try:
            nltk.data.find(_FILES[name])
        except LookupError:
            names.append(name)
            found.append(f"no NLTK data {name!r}")
        except (OSError, BadZipFile) as error:
            names.append(name)
            found.append(f"unreadable NLTK data {name!r} ({error})")
    if not names:
        return
    needed = "; ".join(f"{name} {uses[name]}" for name in names)
    raise ValueError(
        f"Got {' and '.join(found)} in {nltk.data.path}, expected to find there {needed}. Fix: run "
        f"`python -m nltk.downloader {' '.join(names)}`. For a machine without network: run it with `-d FOLDER` on another machine, "
        "copy that folder, and set the environment variable NLTK_DATA to the copy."
    )
