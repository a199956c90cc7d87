"""IFEval's checkers for constraints in words: IFEval's own descriptions come back whole, and other texts get no checker."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.decomposition import checkers_found, read_rows
from trl_miso.decompose.checkers import Checker, checker_of
from trl_miso.decompose.rules import find_constraints
from trl_miso.evaluation.ifeval import load_checkers

DATA = Path(__file__).parents[3] / "shared" / "data"

# Common wordings, and what checks them.
WORDINGS = {
    "Answer with at most 50 words.": ("length_constraints:number_words", {"relation": "less than", "num_words": 51}),
    "It must have 300 or more words": ("length_constraints:number_words", {"relation": "at least", "num_words": 300}),
    "no more than three sentences": ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 4}),
    "more than 1,000 words": ("length_constraints:number_words", {"relation": "at least", "num_words": 1001}),
    "Do not use any commas.": ("punctuation:no_comma", {}),
    "without commas": ("punctuation:no_comma", {}),
    "Write in all capital letters.": ("change_case:english_capital", {}),
    "use only lowercase letters": ("change_case:english_lowercase", {}),
    "No capital letters are allowed.": ("change_case:english_lowercase", {}),
    "at least 3 words in all capital letters": (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 3},
    ),
    "The word 'river' should appear at least twice": (
        "keywords:frequency",
        {"keyword": "river", "relation": "at least", "frequency": 2},
    ),
    "include the keywords 'salt lake' and \"sea\"": ("keywords:existence", {"keywords": ["salt lake", "sea"]}),
    "Do not use the words rain, snow or ice in your answer": (
        "keywords:forbidden_words",
        {"forbidden_words": ["rain", "snow", "ice"]},
    ),
    "Your entire response must be in French": ("language:response_language", {"language": "fr"}),
    "Give exactly 4 bullet points": ("detectable_format:number_bullet_lists", {"num_bullets": 4}),
    'End your answer with the phrase "That is all."': ("startend:end_checker", {"end_phrase": "That is all."}),
    "Wrap your whole reply in double quotes": ("startend:quotation", {}),
}  # fmt: skip
# What no checker tests: other limits, other things, a text that states two things, a text about something else.
WITHOUT = [
    "Answer with exactly 50 words.",
    "Between 50 and 100 words",
    "at most 20 words per sentence",
    "Use the title case.",
    "each line has at most 6 words",
    "Every entry must include the keyword 'tea'",
    "Write each heading in all capital letters",
    "The title must have no more than 10 words.",
    "No heading may be longer, and every paragraph has at least 3 sentences.",
    "Write the first paragraph with at least 3 sentences.",
    "Give a comma-separated list.",
    "Write the title in all caps.",
    "Use capitalized letters for each word.",
    "Your entire response should be in English, and polite.",
    "Give at least 3 bullet points.",
    "Use at least 20 words and no commas.",
    "Be kind to the reader.",
    "Explain what a postscript is.",
    "How many words are there in English?",
    "",
]


@pytest.mark.parametrize(("text", "expected"), WORDINGS.items(), ids=WORDINGS)
def test_common_wordings(text, expected):
    assert checker_of(text) == Checker(*expected)


@pytest.mark.parametrize("text", WITHOUT)
def test_no_checker_is_made_up(text):
    assert checker_of(text) is None


def described(checkers, seed: int) -> dict[str, tuple[str, dict]]:
    """IFEval's own description of each instruction, with values that its checker draws; and these values."""
    random.seed(seed)
    found = {}
    for name, checker in checkers.items():
        instruction = checker(name)
        needs = {"prompt_to_repeat": "Name a river."} if name == "combination:repeat_prompt" else {}
        text = instruction.build_description(**needs)
        found[name] = text, {} if needs else (instruction.get_instruction_args() or {})
    return found


@pytest.mark.parametrize("seed", range(8))
def test_every_description_of_ifeval_comes_back(seed, punkt):
    """For every instruction: its description gives its checker with its values, which lm-eval takes."""
    checkers, _ = load_checkers()
    for name, (text, kwargs) in described(checkers, seed).items():
        # A drawn end phrase has no quotation marks: its last period is also the description's.
        found = checker_of(text)
        assert found is not None and found.id == name, text
        given = {key: value for key, value in kwargs.items() if value is not None}
        lowered = json.loads(json.dumps([found.kwargs, given]).lower())
        assert lowered[0] == lowered[1], text
        if name != "combination:repeat_prompt":
            checkers[name](name).build_description(**found.kwargs)


@pytest.mark.parametrize("seed", range(3))
def test_descriptions_stay_whole_among_others(seed, punkt):
    """Descriptions behind a request are found each as one constraint, also those of several sentences, but for a lead."""
    lead = "In your response, "
    texts = [text for text, _ in described(load_checkers()[0], seed).values()]
    rng = random.Random(seed)
    for _ in range(20):
        chosen = rng.sample(texts, 3)
        found = find_constraints("Describe the sea.\n" + "\n".join(chosen))
        assert [c.text.removeprefix(lead) for c in found] == [text.strip().removeprefix(lead) for text in chosen]


@pytest.mark.skipif(not (DATA / "ifeval").exists(), reason="shared/data/ifeval is not here")
def test_checkers_of_real_prompts():
    """IFEval's 541 prompts are worded by people: what is found is right nearly always, and most is found."""
    recall, precision = checkers_found(read_rows(DATA / "ifeval" / "input_data.jsonl"))
    assert recall > 0.7 and precision > 0.95
