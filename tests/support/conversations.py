"""Chat templates that TRL ships, a tokenizer for each, and conversations of every kind."""

import re
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = {
    file.name.removesuffix(".jinja"): file.read_text()
    for file in files("trl").joinpath("chat_templates").iterdir()
    if file.name.endswith(".jinja")
}
_SPECIAL = re.compile(
    r"<[|｜][^<>{}\s'\"]*?[|｜]>|</?(?:think|s|start_of_turn|end_of_turn|end_of_utterance)>|<turn\|>|<\|turn>|\[/?INST\]"
)
_ENDS = ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|return|>")


def tokenizer_for(template):
    """A byte-level tokenizer to which the special tokens of a template are special."""
    special = sorted({*_SPECIAL.findall(template), "<s>", "</s>", "<|endoftext|>"})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the sea is blue and calm. assistant user system model\n"] * 20, trainer)
    eos = next((token for token in _ENDS if token in special), "<|endoftext|>")
    others = [token for token in special if token not in ("<s>", "</s>", eos)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="</s>", extra_special_tokens=others
    )
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def _function(name, **properties):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": parameters}}


TOOLS = [_function("get_tide", place="string")]
_CALL = {"type": "function", "function": {"name": "get_tide", "arguments": {"place": "Kiel"}}}
_SYSTEM = {"role": "system", "content": "Be kind to sailors."}
_PLAIN = [user("What is the sea?"), assistant("It is blue."), user("And the sky?"), assistant("Blue as well.")]
CONVERSATIONS = {
    "plain": _PLAIN,
    "long": [*_PLAIN, user("And the ship?"), assistant("It sails."), user("Thank you."), assistant("Fair winds!")],
    "system": [_SYSTEM, *_PLAIN],
    "greeting": [_SYSTEM, assistant("Ahoy, sailor!"), *_PLAIN],
    "two answers": [user("What is 2+2?"), assistant("It is 4."), assistant("And the sea is blue.")],
    "two questions": [user("What is 2+2?"), user("Quickly!"), assistant("It is 4.")],
    "thinking": [
        user("What is the sea?"),
        assistant("<think>\nWater, mostly.\n</think>\n\nIt is blue."),
        user("And the sky?"),
        assistant("<think>\nLook up before you speak.\n</think>\n\nBlue as well."),
    ],
    "reasoning": [
        user("What is the sea?"),
        assistant("It is blue.", reasoning_content="Water, mostly."),
        user("And the sky?"),
        assistant("Blue as well.", reasoning_content="Look up before you speak."),
    ],
    "tools": [
        user("How is the tide?"),
        assistant("", tool_calls=[_CALL]),
        {"role": "tool", "name": "get_tide", "content": "low water"},
        assistant("The tide is low."),
        user("Thank you!"),
        assistant("Fair winds!"),
    ],
}
