"""A language that a model of a million parameters can learn: texts, constraints that can be checked, a tokenizer, splits.

A text has one to three clauses about one of eight topics, such as `dark owl hunts deer , fern hides log ?`. Constraints
are derived from the finished text, as Crab's are, so the text satisfies them. There are 14 kinds, at most one of each in a prompt.
"""

import hashlib
import random
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# topic: 12 nouns / 6 verbs / 6 adjectives
TOPICS = {
    topic: tuple(tuple(kind.split()) for kind in words.split("/"))
    for topic, words in {
        "forest": "oak fern moss wolf owl path stream log mushroom squirrel deer cabin"
        "/ hunts finds hides circles follows leaves / dark mossy tall silent wet old",
        "city": "tram tower square clerk bus lamp shop crowd bench taxi mayor kiosk"
        "/ passes meets blocks serves lights calls / busy loud grey modern narrow bright",
        "sea": "wave crab ship gull shell whale sailor island net coral rope anchor"
        "/ carries lifts sinks chases greets hauls / salty deep blue stormy calm cold",
        "farm": "cow barn plough hen field farmer goat fence tractor bucket haystack dog"
        "/ feeds pulls guards milks pushes smells / muddy brown hungry dusty sturdy wide",
        "kitchen": "pot spoon oven knife kettle cook onion table bowl towel pan cup"
        "/ warms cuts stirs fills cleans holds / hot sharp sour fresh copper round",
        "school": "teacher desk pupil book chalk clock map bell ruler globe pencil janitor"
        "/ opens draws reads moves hears studies / wooden curious early clever strict tidy",
        "market": "stall basket baker melon coin scale buyer cheese cart singer carpet spice"
        "/ sells weighs offers counts wraps buys / cheap ripe crowded golden noisy sweet",
        "mountain": "peak hut trail eagle cliff guide cave cloud pine tent rock glacier"
        "/ climbs shelters faces reaches hits crosses / steep high lonely white distant rough",
    }.items()
}
WORDS = [word for kinds in TOPICS.values() for kind in kinds for word in kind]
REQUESTS = ("write about the {} .", "tell of the {} .", "describe the {} .")
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
    "twenty-one",
    "twenty-two",
]
MAX_TOKENS = 3 * 6 + 1  # of the longest text and the eos token

# The wording of each kind of constraint, and the check of a text, given as its tokens.
CHECKS: dict[str, Callable[..., bool]] = {
    r"mention (\S+) \.": lambda text, word: word in text,
    r"avoid (\S+) \.": lambda text, word: word not in text,
    r"begin with (\S+) \.": lambda text, word: text[0] == word,
    r"end with (\S+) \.": lambda text, word: _words(text)[-1:] == [word],
    r"put (\S+) before (\S+) \.": lambda text, a, b: a in text and b in text[text.index(a) + 1 :],
    r"join (\S+) and (\S+) \.": lambda text, a, b: (a, b) in zip(text, text[1:], strict=False),
    r"repeat (\S+) \.": lambda text, word: text.count(word) >= 2,
    r"use (\S+) words \.": lambda text, n: len(_words(text)) == NUMBERS.index(n),
    r"use at least (\S+) words \.": lambda text, n: len(_words(text)) >= NUMBERS.index(n),
    r"use at most (\S+) words \.": lambda text, n: len(_words(text)) <= NUMBERS.index(n),
    r"write (\S+) sentences \.": lambda text, n: sum(token in ".?!" for token in text) == NUMBERS.index(n),
    r"close with ([?!]) \.": lambda text, mark: text[-1] == mark,
    r"no commas \.": lambda text: "," not in text,
    r"one comma \.": lambda text: text.count(",") == 1,
}

SPLITS = {"test": (0,), "dev": (1,), "train": (2, 3, 4, 5, 6, 7)}  # eighths of all texts


def satisfied(constraint: str, text: str) -> bool:
    """Whether `text` satisfies `constraint`, by the constraint's wording. An empty text satisfies no constraint.

    Raises:
        ValueError: If no wording in `CHECKS` matches.
    """
    for wording, check in CHECKS.items():
        if match := re.fullmatch(wording, constraint):
            return bool(text) and check(text.split(), *match.groups())
    raise ValueError(f"Got the constraint {constraint!r}, expected a wording of CHECKS. Fix: correct it.")


def well_formed(text: str, topic: str) -> bool:
    """Whether `text` is one to three clauses of the topic's words, each with its punctuation mark."""
    kinds = {word: letter for letter, words in zip("nva", TOPICS[topic], strict=True) for word in words}
    shape = "".join(kinds.get(token, token if token in (",", ".", "?", "!") else "x") for token in text.split())
    return re.fullmatch(r"(a?nva?n[,.]){0,2}a?nva?n[.?!]", shape) is not None


def draw_text(rng: random.Random, topic: str) -> str:
    """A text of one to three clauses about the topic."""
    nouns, verbs, adjectives = TOPICS[topic]
    tokens: list[str] = []
    for _ in range(rng.choices((1, 2, 3), (3, 4, 3))[0]):
        a, b = rng.sample(nouns, 2)
        before, after = ([rng.choice(adjectives)] if rng.random() < 0.4 else [] for _ in range(2))
        tokens += [*before, a, rng.choice(verbs), *after, b, rng.choices((",", "."), (2, 3))[0]]
    tokens[-1] = rng.choices((".", "?", "!"), (3, 1, 1))[0]
    return " ".join(tokens)


def true_constraints(rng: random.Random, topic: str, text: str) -> list[str]:
    """One constraint of each kind; `satisfied` tells which of them the text satisfies."""
    tokens = text.split()
    words = _words(tokens)
    unused = [word for kind in TOPICS[topic] for word in kind if word not in words]
    pairs = [pair for pair in zip(tokens, tokens[1:], strict=False) if all(map(str.isalpha, pair))]
    first, second = sorted(rng.sample(range(len(words)), 2))
    statements = [
        f"mention {rng.choice(words)} .",
        f"avoid {rng.choice(unused)} .",
        f"begin with {words[0]} .",
        f"end with {words[-1]} .",
        f"put {words[first]} before {words[second]} .",
        "join {} and {} .".format(*rng.choice(pairs)),
        f"repeat {max(words, key=words.count)} .",
        f"use {NUMBERS[len(words)]} words .",
        f"use at least {NUMBERS[max(1, len(words) - rng.randint(0, 2))]} words .",
        f"use at most {NUMBERS[len(words) + rng.randint(0, 2)]} words .",
        f"write {NUMBERS[sum(token in '.?!' for token in tokens)]} sentences .",
        f"close with {tokens[-1]} .",
        "no commas .",
        "one comma .",
    ]
    return [statement for statement in statements if tokens[-1] != "." or not statement.startswith("close")]


def belongs(content: str, split: str) -> bool:
    """Whether a text, or a set of constraints, is of the split, by its hash."""
    return hashlib.sha256(content.encode()).digest()[0] % 8 in SPLITS[split]


def draw_rows(split: str, seed: str, counts: list[int]) -> list[dict[str, Any]]:
    """One row per number of constraints in `counts`: request, topic, constraints, text.

    No text and no set of several constraints occurs in two splits, since the content decides the split. A row depends on the
    split, the seed and its index only.
    """
    return [_draw_row(random.Random(f"{split}-{seed}-{i}"), split, count) for i, count in enumerate(counts)]


def _draw_row(rng: random.Random, split: str, count: int) -> dict[str, Any]:
    while True:
        topic = rng.choice(list(TOPICS))
        text = draw_text(rng, topic)
        if not belongs(text, split):
            continue
        candidates = [statement for statement in true_constraints(rng, topic, text) if satisfied(statement, text)]
        if len(candidates) < count:
            continue
        for _ in range(50):
            constraints = rng.sample(candidates, count)
            if count < 2 or belongs(" ".join([topic, *sorted(constraints)]), split):
                request = rng.choice(REQUESTS).format(topic)
                return {"request": request, "topic": topic, "constraints": constraints, "text": text}


def prompt(row: dict[str, Any]) -> str:
    """The full instruction, joined as `trl_miso.data.contexts` joins it."""
    if not row["constraints"]:
        return row["request"]
    return "\n\n".join([row["request"], "\n".join(row["constraints"])])


def messages(role: str, content: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": role, "content": content}]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words. A turn begins with a token of its role; the assistant's ends with the eos token."""
    roles = ["<|user|>", "<|assistant|>"]
    wordings = " ".join(re.sub(r"\(\S+?\)|\\", " ", wording) for wording in CHECKS)
    words = " ".join([wordings, *REQUESTS, *NUMBERS, *TOPICS, "copy . ? ! ,"]).replace("{}", " ").split()
    vocabulary = ["<|pad|>", "<|eos|>", *roles, *dict.fromkeys(words + WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        extra_special_tokens=roles,
        padding_side="left",
        chat_template=(
            "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] }}"
            "{{ ' ' + eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
        ),
    )


def _words(tokens: list[str]) -> list[str]:
    return [token for token in tokens if token.isalpha()]
