"""Generated rows in Crab's schema and a toy model: no download, no GPU, no licence, the same on every machine.

Answers are short texts about one of eight topics. Constraints are derived from the finished answer, as Crab's are, so every answer
satisfies its constraints. A check follows from the wording of each constraint.

    rows = synthetic_rows(1000)
    tokenizer = build_tokenizer(rows)
    model = build_model(tokenizer)
"""

import random
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# topic: 12 nouns / 6 verbs / 6 adjectives
_TOPICS = {
    topic: tuple(kind.split() for kind in words.split("/"))
    for topic, words in {
        "river": "boat bridge stone fish reed heron bank ferry mill otter willow pebble"
        "/ crosses carries follows touches hides leaves / quiet muddy narrow silver shallow cold",
        "garden": "rose bee gate hedge spade worm tulip fence sparrow apple shed ladder"
        "/ shades feeds guards covers needs brushes / green sweet sunny wild fragrant tidy",
        "kitchen": "pot spoon oven bread knife kettle cook butter onion table bowl towel"
        "/ warms holds cuts cleans stirs fills / hot sharp salty round fresh copper",
        "harbour": "ship anchor gull rope sailor crane barrel lamp net pier captain crate"
        "/ lifts pulls watches loads signals greets / rusty heavy foggy tall busy wet",
        "mountain": "goat peak hut trail eagle cliff snow guide cave cloud pine tent"
        "/ climbs reaches shelters faces circles passes / steep high lonely white distant rocky",
        "market": "stall basket baker melon coin scale buyer cheese cart singer carpet spice"
        "/ sells weighs finds offers counts wraps / loud cheap ripe crowded golden noisy",
        "farm": "horse barn tractor hen field farmer cow plough dog bucket haystack fox"
        "/ chases works pushes visits keeps smells / brown sturdy dusty hungry red old",
        "school": "teacher desk pupil book chalk clock map bell ruler globe window pencil"
        "/ opens draws borrows studies moves hears / wooden curious early clever blue strict",
    }.items()
}
_REQUESTS = (
    "Write about the {}.",
    "Tell me about the {}.",
    "Describe a day at the {}.",
    "Give a short account of the {}.",
    "What happens at the {}?",
)
_OPENERS = ("Today", "Here", "Now", "Often", "Sometimes", "Soon", "Perhaps", "Once")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# the wording of each constraint, and the check of an answer; words are compared without case
_CHECKS: dict[str, Callable[..., bool]] = {
    r"Mention the word (\w+)\.": lambda text, word: word in _words(text),
    r"Do not use the word (\w+)\.": lambda text, word: word not in _words(text),
    r"Mention the word (\w+) before the word (\w+)\.": lambda text, a, b: b in _words(text)[_index(text, a) :],
    r"Use the word (\w+) exactly (\w+) times\.": lambda text, word, n: _words(text).count(word) == _NUMBERS.index(n),
    r"Begin with the word (\w+)\.": lambda text, word: _words(text)[:1] == [word],
    r"End with the word (\w+)\.": lambda text, word: _words(text)[-1:] == [word],
    r"Write exactly (\w+) sentences\.": lambda text, n: len(re.findall(r"[.!?]", text)) == _NUMBERS.index(n),
    r"Use at least (\d+) words\.": lambda text, n: len(_words(text)) >= int(n),
    r"Use no more than (\d+) words\.": lambda text, n: len(_words(text)) <= int(n),
    r"End with a question mark\.": lambda text: text.endswith("?"),
    r"End with an exclamation mark\.": lambda text: text.endswith("!"),
    r"Do not ask a question\.": lambda text: "?" not in text,
    r"Do not use any commas\.": lambda text: "," not in text,
    r"Use only lowercase letters\.": lambda text: text == text.lower(),
    r"Use only capital letters\.": lambda text: text == text.upper(),
}


def synthetic_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Generate `n` rows `{"id", "cnt_id", "source", "messages"}`; row i depends on `(seed, i)` only, not on n.

    About one in ten is a plain exchange, like the ShareGPT rows mixed into Crab; its id has no kind. The others are `_forward`
    rows. Nine in ten of these have 3 to 7 constraints, the rest 1 or 2, and half of them have 1 to 3 demonstration turns first.
    The last user turn is the request, a blank line, then one constraint per line.
    """
    rows = []
    for i in range(n):
        rng = random.Random(f"{seed}-{i}")
        name = f"synthetic_{i:06d}"
        if rng.random() < 0.1:
            messages = _exchange(rng, 0)
        else:
            name += "_forward"
            count = rng.randint(3, 7) if rng.random() < 0.9 else rng.randint(1, 2)
            shots = rng.randint(1, 3) if rng.random() < 0.5 else 0
            messages = [message for _ in range(shots) for message in _exchange(rng, rng.randint(0, count))]
            messages += _exchange(rng, count)
        rows.append({"id": name, "cnt_id": str(i), "source": "synthetic", "messages": messages})
    return rows


def check_constraints(constraints: list[str], answer: str) -> list[bool]:
    """Whether `answer` satisfies each constraint, by the constraint's wording.

    Raises:
        ValueError: If `synthetic_rows` does not write such a constraint.
    """
    return [_check(constraint, answer) for constraint in constraints]


def build_tokenizer(rows: Iterable[dict[str, Any]], vocab_size: int = 1024) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE on the rows' messages; its chat template has one header token per role.

    Only assistant turns have an end token, the eos token. The turn's text and the eos token lie within the template's generation
    markers, so that TRL's `assistant_only_loss` works. There is no bos token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=2048,
        chat_template=(
            "{% for message in messages %}"
            "{{ '<|' + message['role'] + '|>' }}"
            "{% if message['role'] == 'assistant' %}"
            "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
            "{% else %}{{ message['content'] }}{% endif %}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
        ),
    )


def build_model(tokenizer: "PreTrainedTokenizerFast", seed: int = 0) -> "LlamaForCausalLM":
    """A Llama of 0.9M parameters in float32, with random weights from `seed`. The global random state does not change."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _exchange(rng: random.Random, count: int) -> list[dict[str, str]]:
    """A user turn with `count` constraints, and the answer from which they were derived."""
    topic = rng.choice(list(_TOPICS))
    request, answer = rng.choice(_REQUESTS).format(topic), _answer(rng, topic)
    constraints = rng.sample(_true_constraints(rng, topic, answer), count)
    user = "\n\n".join([request, "\n".join(constraints)]) if constraints else request
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def _answer(rng: random.Random, topic: str) -> str:
    """A text of two to five sentences about the topic."""
    nouns, verbs, adjectives = _TOPICS[topic]
    sentences = []
    for _ in range(rng.randint(2, 5)):
        a, b, c = rng.sample(nouns, 3)
        (v, w), adjective = rng.sample(verbs, 2), rng.choice(adjectives)
        forms = (
            f"the {adjective} {a} {v} the {b}",
            f"the {a} {v} the {adjective} {b}",
            f"the {a} and the {b} are {adjective}",
            f"the {a} {v} the {b} and {w} the {c}",
            f"near the {c}, the {a} {v} the {b}",
        )
        sentences.append(rng.choice(forms) + ".")
    sentences[0] = f"{rng.choice(_OPENERS)} {sentences[0]}"
    if rng.random() < 0.2:
        sentences[-1] = f"what {rng.choice(verbs)} the {rng.choice(adjectives)} {rng.choice(nouns)}?"
    elif rng.random() < 0.25:
        sentences[-1] = sentences[-1][:-1] + "!"
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return rng.choices((text, text.lower(), text.upper()), (6, 1, 1))[0]


def _true_constraints(rng: random.Random, topic: str, answer: str) -> list[str]:
    """At least ten distinct constraints in the wordings of `_CHECKS`, all satisfied by the answer."""
    words = _words(answer)
    vocabulary = [word for kind in _TOPICS[topic] for word in kind]
    used = [word for word in dict.fromkeys(words) if word in vocabulary]
    unused = [word for word in vocabulary if word not in words]
    first, second = sorted(rng.sample(used, 2), key=words.index)
    often = max(used, key=words.count)
    statements = [
        *(f"Mention the word {word}." for word in rng.sample(used, 2)),
        *(f"Do not use the word {word}." for word in rng.sample(unused, 2)),
        f"Mention the word {first} before the word {second}.",
        f"Begin with the word {words[0].capitalize()}.",
        f"End with the word {words[-1]}.",
        f"Write exactly {_NUMBERS[len(re.findall('[.!?]', answer))]} sentences.",
        f"Use at least {len(words) // 5 * 5} words.",
        f"Use no more than {len(words) // 5 * 5 + 5} words.",
        "End with a question mark.",
        "End with an exclamation mark.",
        "Do not ask a question.",
        "Do not use any commas.",
        "Use only lowercase letters.",
        "Use only capital letters.",
    ]
    if words.count(often) > 1:
        statements.append(f"Use the word {often} exactly {_NUMBERS[words.count(often)]} times.")
    return [statement for statement in statements if _check(statement, answer)]


def _check(constraint: str, answer: str) -> bool:
    for wording, satisfied in _CHECKS.items():
        if match := re.fullmatch(wording, constraint):
            return satisfied(answer, *(word.lower() for word in match.groups()))
    raise ValueError(
        f"got the constraint {constraint!r}; expected a wording that `synthetic_rows` writes, such as 'Mention the word "
        "river.'. Fix: check other constraints with your own function."
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _index(text: str, word: str) -> int:
    """Index of the first occurrence of `word` among the words; their number if there is none."""
    words = _words(text)
    return words.index(word) if word in words else len(words)
