"""Tokenizers that preparation cannot use are refused by name, before a model is loaded."""

import json

import pytest
from datasets import Dataset
from transformers import AutoProcessor, PreTrainedTokenizerBase

from tests.support.conversations import TEMPLATES, assistant, tokenizer_for, user
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.data.pipeline import Pipeline
from trl_miso.data.tokenization import RowTokenizer
from trl_miso.data.tokenizers import without_added_eos

CHAT = {"prompt": [user("the sea")], "completion": [assistant("blue")]}
ROWS = {
    "prompt": CHAT,
    "contexts": {"contexts": [CHAT["prompt"], [user("the ship")]], "completion": CHAT["completion"]},
    "messages": {"messages": CHAT["prompt"] + CHAT["completion"]},
    "plain text": {"prompt": "the sea", "completion": "blue"},
    "text": {"text": "the sea"},
}


class MistralCommonBackend(PreTrainedTokenizerBase):
    """What transformers' class of that name is without the package mistral-common."""

    def __init__(self):
        super().__init__(eos_token="</s>", pad_token="<pad>", bos_token="<s>")

    def __repr__(self):
        return type(self).__name__

    def get_vocab(self):
        return {"<s>": 0, "</s>": 1, "<pad>": 2}

    def convert_tokens_to_ids(self, tokens):
        return self.get_vocab().get(tokens)

    def added_tokens_decoder(self):
        raise NotImplementedError

    def get_chat_template(self, *args, **kwargs):
        raise NotImplementedError


class Strange(MistralCommonBackend):
    """Any other class."""


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("cls", [MistralCommonBackend, Strange])
@pytest.mark.parametrize("given", [True, False])
def test_tokenizers_without_chat_templates_are_refused_before_loading(given, cls, kind, tmp_path, monkeypatch):
    """Whether the user gives the tokenizer, or SFTTrainer finds it beside the model: its weights are never read."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: cls())
    args = MISOSFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    rows = [ROWS[kind]]
    with pytest.raises(ValueError, match=f"class {cls.__name__}, expected .* Fix: .*mistral_format=False"):
        MISOSFTTrainer(
            str(tmp_path), args, train_dataset=Dataset.from_list(rows), processing_class=cls() if given else None
        )


def test_tokenizers_are_refused_wherever_rows_are_tokenized(tmp_path):
    args = MISOSFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    for row in ROWS.values():
        with pytest.raises(ValueError, match="class MistralCommonBackend"):
            Pipeline.of(args, MistralCommonBackend(), lambda *args: args[0])(Dataset.from_list([row]), "eval", "single")
    with pytest.raises(ValueError, match="class MistralCommonBackend"):
        RowTokenizer(MistralCommonBackend())([], [])


def test_the_tokenizer_of_tokenized_rows_is_not_asked(tmp_path):
    args = MISOSFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"input_ids": [0, 2, 1], "labels": [-100, 2, 1]}])
    pipeline = Pipeline.of(args, MistralCommonBackend(), lambda rows, *args: rows)
    pipeline.check(rows)
    assert list(pipeline(rows, "train").rows)[0]["input_ids"] == [0, 2, 1]


def test_an_eos_that_cannot_be_turned_off_is_refused():
    class Ends(type(tokenizer_for(TEMPLATES["llama3"]))):
        def update_post_processor(self):
            """Keep it."""

    tokenizer = tokenizer_for(TEMPLATES["llama3"])
    assert without_added_eos(tokenizer) is tokenizer
    tokenizer.add_eos_token = True
    assert without_added_eos(tokenizer)("a").input_ids == tokenizer("a").input_ids[:-1]
    tokenizer.__class__ = Ends
    with pytest.raises(ValueError, match="class Ends that ends every text with an eos token"):
        without_added_eos(tokenizer)
