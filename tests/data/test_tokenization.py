"""Contexts and completion to token ids: SFTTrainer's tokens, the boundary, truncation, draws."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_miso.data.contexts import ContextRow, full_row, parallel_row
from trl_miso.data.layout import Layout, columns
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped
from trl_miso.data.token_ids import token_ids
from trl_miso.data.tokenization import RowTokenizer, Tokenized
from trl_miso.segments import decode
from trl_miso.sources.crab import crab_row
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

# Llama 3's: punctuation takes the newlines after it along, so ".\n\n" can be one token
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    f"{word}{end}\n\n### Response:\n<|user|>\n<|assistant|>\n" for word in ("the sea", "a ship") for end in ".?!:"
]

TEMPLATES = {
    # Crab's own: headers are plain text
    "tulu": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token + '\\n' }}"
        "{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    # the header's first token takes the last character of the prompt in
    "merging": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '\\n\\n### Response:\\n' + m.content }}"
        "{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
    ),
    # Mistral's: nothing but the end of the user turn announces the answer
    "no_generation_prompt": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    # Qwen 3's: the last answer is rendered with thinking that the generation prompt does not begin
    "qwen3": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{% endif %}"
    ),
    # Gemma 4's: the generation prompt ends with an empty thought that the whole conversation lacks
    "gemma4": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think></think>' }}{% endif %}"
    ),
    "tools": (
        "{% if mood is defined and mood %}{{ mood }}{% endif %}{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
PIECES = [
    "<a>",
    "<b>",
    "<c>",
    "<a><b>",
    "b><c",
    "<n>",
    "plain",
    "<l>",
    "<r>",
    " ",
    "  ",
    "\n",
    "The sea",
    "é.",
    "<a",
    "b>",
    "c>",
    "世",
]
SPECIAL = ["<|pad|>", "<|eos|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(template=None):
    """A byte-level BPE that adds a bos token to plain text, and merges across ends of sentences and newlines."""
    bpe = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    answers = [message["content"] for row in synthetic_rows(20) for message in row["messages"]]
    bpe.train_from_iterator(CORPUS * 20 + answers, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATES.get(template),
        model_max_length=100_000,
    )


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(200)


@pytest.fixture(scope="module")
def synthetic(rows):
    return build_tokenizer(rows)


@pytest.fixture(scope="module", params=["synthetic", *TEMPLATES])
def chat_tokenizer(request, synthetic):
    return synthetic if request.param == "synthetic" else make_tokenizer(request.param)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def sft(rows, tokenizer, tmp_path, max_length=1000, **config):
    """The rows as SFTTrainer trains them: `(input_ids, labels)` each."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    args = SFTConfig(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        shuffle_dataset=False,
        max_length=max_length,
        **config,
    )
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def layout(**options):
    defaults = {"max_length": 1000, "seed": 0, "chunk_probs": (1.0,), "para_prob": 1.0, "full_context_weight": None}
    return Layout(DataOptions(**defaults | {"output_positions": "successive"} | options))


def tokenize(tokenizer, rows, kwargs=None, **options):
    return RowTokenizer(tokenizer, **options)(rows, kwargs or [{"tools": None}] * len(rows))


def laid_out(tokenized, mode, make):
    """`(input_ids, labels)` of the rows that are not dropped."""
    made = []
    for one in tokenized:
        try:
            prepared = make([one], mode, [None])
        except RowDropped:
            continue
        made.append((prepared["input_ids"], prepared["labels"]))
    return made


def example_of(prepared):
    (example,) = decode(prepared["miso_layout"])
    return example


CHATS = [
    {"prompt": [user("Describe the sea.")], "completion": [assistant("Blue and wide.")]},
    {"prompt": [user("Describe the sea.")], "completion": [assistant("\n\nBlue.\n")]},
    {
        "prompt": [{"role": "system", "content": "Be brief."}, user("What is a ship?")],
        "completion": [assistant(" A boat")],
    },
    {"prompt": [user("Hi!"), assistant("Hello."), user("A ship\n")], "completion": [assistant("the sea")]},
]
PLAIN = [
    {"prompt": "Describe the sea.", "completion": " Blue and wide."},
    {"prompt": "Describe the sea.\n\n### Response:\n", "completion": "Blue and wide."},
    {
        "prompt": "Question: what is a ship? Answer: ",
        "completion": "a ship",
    },  # the space joins the completion's first word
    {"prompt": "Describe the sea.", "completion": "\n\nBlue.<|eos|>"},  # ".\n\n" is one token
    {"prompt": "the s", "completion": "ea"},
]


@pytest.mark.parametrize("mode", ["single", "para", "succ"])
def test_one_context_is_what_sft_trains_on_in_chats(chat_tokenizer, rows, tmp_path, mode):
    data = CHATS + [{k: crab_row(row)[k] for k in ("prompt", "completion")} for row in rows[:10]]
    expected = sft(data, chat_tokenizer, tmp_path)
    assert len(expected) == len(data)
    tokenized = tokenize(chat_tokenizer, [full_row(row, "prompt") for row in data])
    assert laid_out(tokenized, mode, layout()) == expected
    # the chunks of succ are cut from the same tokens
    assert laid_out(tokenized, "succ", layout(chunk_probs=(0.0, 0.0, 1.0))) == expected


@pytest.mark.parametrize("response_template", [None, "e"])
def test_one_context_is_what_sft_trains_on_in_plain_text(tmp_path, response_template):
    tokenizer = make_tokenizer()
    data = [row for row in PLAIN if response_template is None or response_template in row["prompt"]]
    expected = sft(data, tokenizer, tmp_path)
    assert len(expected) == len(data) >= 4
    tokenized = tokenize(tokenizer, [full_row(row, "prompt") for row in data], response_template=response_template)
    assert laid_out(tokenized, "para", layout()) == expected
    assert laid_out(tokenized, "succ", layout(chunk_probs=(0.0, 1.0))) == expected
    assert [ids.count(tokenizer.bos_token_id) for ids, _ in expected] == [1] * len(data)
    assert [ids.count(tokenizer.eos_token_id) for ids, _ in expected] == [1] * len(data)


def test_a_template_with_a_bos_token_gets_no_second_one(rows):
    tokenizer = make_tokenizer("merging")
    assert tokenizer("the sea")["input_ids"][0] == tokenizer.bos_token_id
    for tokenized in tokenize(tokenizer, [parallel_row(crab_row(row), "constraints") for row in rows[:20]]):
        assert [context.count(tokenizer.bos_token_id) for context in tokenized.contexts] == [1] * len(
            tokenized.contexts
        )
        assert tokenizer.bos_token_id not in tokenized.output


@pytest.mark.parametrize("max_length", [20, 28, 40, 60])
def test_truncation_cuts_and_drops_what_sft_cuts_and_drops(synthetic, rows, tmp_path, max_length):
    data = CHATS + [{k: crab_row(row)[k] for k in ("prompt", "completion")} for row in rows[:60]]
    expected = sft(data, synthetic, tmp_path, max_length=max_length)
    tokenized = tokenize(synthetic, [full_row(row, "prompt") for row in data])
    assert laid_out(tokenized, "para", layout(max_length=max_length)) == expected
    assert 0 < len(expected) < len(data)
    assert max(len(ids) for ids, _ in expected) == max_length


def test_assistant_only_loss_masks_as_sft_does(rows, tmp_path):
    tokenizer = make_tokenizer("tools")
    data = CHATS + [{k: crab_row(row)[k] for k in ("prompt", "completion")} for row in rows[:10]]
    # a completion of several turns, of which only the assistant's are learned
    data.append({"prompt": [user("a")], "completion": [assistant("b"), user("the sea"), assistant("d")]})
    expected = sft(data, tokenizer, tmp_path, assistant_only_loss=True)
    made = [full_row(row, "prompt") for row in data]
    assert laid_out(tokenize(tokenizer, made, assistant_only_loss=True), "para", layout()) == expected
    assert laid_out(tokenize(tokenizer, made), "para", layout()) != expected


def test_assistant_only_loss_needs_markers():
    with pytest.raises(ValueError, match=r"Got assistant_only_loss=True .*Fix: .*generation"):
        tokenize(make_tokenizer("tulu"), [full_row(CHATS[0], "prompt")], assistant_only_loss=True)


def test_tools_and_template_arguments_reach_every_context(tmp_path):
    tokenizer = make_tokenizer("tools")
    tools = [{"type": "function", "function": {"name": "sail"}}]
    kwargs = [{"tools": None}, {"tools": tools, "mood": "calm"}, {"tools": tools}, {"tools": None, "mood": "wild"}]
    data = [
        row | {"tools": extra["tools"], "chat_template_kwargs": {"mood": extra.get("mood", "")}}
        for row, extra in zip(CHATS, kwargs, strict=True)
    ]
    expected = sft(data, tokenizer, tmp_path)
    tokenized = tokenize(tokenizer, [full_row(row, "prompt") for row in CHATS], kwargs)
    assert laid_out(tokenized, "para", layout()) == expected
    row = ContextRow([[user("the sea")], [user("a ship")]], [assistant("b")])
    (two,) = tokenize(tokenizer, [row], [{"tools": tools}])
    assert ["sail" in tokenizer.decode(context) for context in two.contexts] == [True, True]
    assert "sail" not in tokenizer.decode(two.output)


def test_a_chat_template_of_its_own_is_used():
    tokenizer = make_tokenizer("tulu")
    (made,) = tokenize(tokenizer, [full_row(CHATS[0], "prompt")], chat_template=TEMPLATES["qwen3"])
    assert tokenizer.decode(made.output).startswith("<|im_start|>assistant\n")


GENERATION_PROMPTS = {
    "synthetic": "<|assistant|>",
    "tulu": "<|assistant|>\n",
    "merging": "### Response:\n",
    "qwen3": "<|im_start|>assistant\n",
    "gemma4": "<|im_start|>assistant\n",
    "tools": "<|im_start|>assistant\n",
}


@pytest.mark.parametrize("template", GENERATION_PROMPTS)
def test_the_output_begins_with_the_generation_prompt_unlabelled(template, synthetic, rows):
    tokenizer = synthetic if template == "synthetic" else make_tokenizer(template)
    made = [parallel_row(crab_row(row), "constraints") for row in rows[:40]]
    heads = Counter()
    for row, tokenized in zip(made, tokenize(tokenizer, made), strict=True):
        assert len(tokenized.contexts) == len(row.contexts)
        head = next(i for i, label in enumerate(tokenized.labels) if label != -100)
        assert head >= 1, "the first labelled token is never the first of the output"
        assert tokenized.labels[head:] == tokenized.output[head:]
        heads[tokenizer.decode(tokenized.output[:head])] += len(row.contexts)
        for context, ids in zip(row.contexts, tokenized.contexts, strict=True):
            prompt = tokenizer.apply_chat_template(context, add_generation_prompt=True, return_dict=False)
            rest = len(prompt) - len(ids)
            assert prompt[: len(ids)] == ids
            # gemma4's has an ending that the trained output lacks
            assert prompt[len(ids) :][:head] == tokenized.output[: min(head, rest)]
        assert (
            tokenizer.decode(tokenized.output[head:]).strip().startswith(("<think>", row.completion[0]["content"][:5]))
        )
    # a token in which all contexts end alike comes along
    alike = {end + "\n\n### Response:\n" for end in ".?!"} if template == "merging" else set()
    assert set(heads) <= {GENERATION_PROMPTS[template]} | alike
    assert heads[GENERATION_PROMPTS[template]] > 20


def test_headers_that_merge_with_the_prompt_stay_with_their_context():
    tokenizer = make_tokenizer("merging")
    assert ".\n\n" in map(tokenizer.decode, tokenizer("the sea.\n\n### Response:\n")["input_ids"])
    row = ContextRow([[user("the sea.")], [user("the sea?")], [user("a ship!")]], [assistant("blue")])
    (made,) = tokenize(tokenizer, [row])
    assert tokenizer.decode(made.output) == "### Response:\nblue<|eos|>"
    assert [tokenizer.decode(context) for context in made.contexts] == [
        "<|bos|>the sea.\n\n",
        "<|bos|>the sea?\n\n",
        "<|bos|>a ship!\n\n",
    ]


def test_without_a_generation_prompt_the_last_common_token_begins_the_output():
    tokenizer = make_tokenizer("no_generation_prompt")
    row = ContextRow([[user("the sea.")], [user("a ship")]], [assistant("blue")])
    (made,) = tokenize(tokenizer, [row])
    head = next(i for i, label in enumerate(made.labels) if label != -100)
    assert head == 1
    assert all(tokenizer.decode(context + made.output[:1]).endswith("[/INST]") for context in made.contexts)


def test_chat_contexts_that_end_differently_are_refused():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = ContextRow([[user("the sea")], [user("a ship")]], [assistant("b")])
    with pytest.raises(ValueError, match=r"Got contexts that end differently.*sea.*ship.*Fix: use a chat template"):
        tokenize(make_tokenizer(), [row], chat_template=template)


def test_plain_contexts_that_end_differently_need_a_response_template():
    tokenizer = make_tokenizer()
    row = ContextRow(["Describe the sea", "Describe a ship"], "Blue")
    with pytest.raises(ValueError, match=r"Got contexts that end differently.*sea.*ship.*Fix: set response_template"):
        tokenize(tokenizer, [row])
    for template in ("\n\n### Response:\n", "### Response:\n", "\n"):
        row = ContextRow([f"{context}.\n\n### Response:\n" for context in ("the sea", "a ship")], "Blue")
        (made,) = tokenize(tokenizer, [row], response_template=template)
        assert tokenizer.decode(made.output).endswith("Blue<|eos|>")
        assert [tokenizer.decode(context + made.output) for context in made.contexts] == [
            f"<|bos|>{context}Blue<|eos|>" for context in row.contexts
        ]
    # the token that holds the end of a context and the template's beginning stays with the context
    row = ContextRow(["the sea.\n\n### Response:\n", "a ship?\n\n### Response:\n"], "Blue")
    (made,) = tokenize(tokenizer, [row], response_template="\n\n### Response:\n")
    assert tokenizer.decode(made.output) == "### Response:\nBlue<|eos|>"


@pytest.mark.parametrize(
    "contexts", [["the sea\n### Response:\n", "a ship\n"], ["the sea\n", "a ship\n### Response:\n"], ["the sea\n"]]
)
def test_every_prompt_must_end_with_the_response_template(contexts):
    with pytest.raises(ValueError, match=r"Got a prompt that ends with .*response_template '### Response:\\n'.*Fix"):
        tokenize(make_tokenizer(), [ContextRow(contexts, "Blue")], response_template="### Response:\n")


def test_text_and_messages_are_not_mixed():
    rows = [full_row(CHATS[0], "prompt"), full_row(PLAIN[0], "prompt")]
    with pytest.raises(ValueError, match="Got rows of plain text and rows of messages in one dataset.*Fix"):
        tokenize(make_tokenizer("tulu"), rows)


def test_a_context_without_tokens_of_its_own_drops_the_row():
    # the only token of "?" is the last one common to all contexts, which begins the output
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    (dropped,) = tokenize(tokenizer, [ContextRow(["a?", "?"], " y")])
    assert isinstance(dropped, RowDropped)
    assert str(dropped) == "an empty context"


def test_text_is_cut_at_special_tokens_without_a_trace(chat_tokenizer, rows):
    """Earlier turns are tokenized once a row; the ids are those of each text in one piece."""
    tokenizer = RowTokenizer(chat_tokenizer)
    made = [parallel_row(crab_row(row), "constraints") for row in rows[:60]]
    made.append(
        ContextRow(
            [[user("<|im_start|> <|eos|>x"), user(c)] for c in ("the <|eos|>sea", "the <|eos|>ship")], [assistant("b")]
        )
    )
    rendered = [[t.whole, t.before, *t.prompts] for t in tokenizer._render(made, [{"tools": None}] * len(made))]
    expected = [[chat_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for texts in rendered]
    assert list(token_ids(chat_tokenizer, rendered, add_special_tokens=False)) == expected


def test_special_tokens_that_take_spaces_along_are_no_place_to_cut():
    tokenizer = make_tokenizer("qwen3")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<mask>", special=True, lstrip=True)]})
    row = ContextRow([[user(f"the sea   <mask> {end}")] for end in ("a", "b")], [assistant("blue")])
    (made,) = tokenize(tokenizer, [row])
    for context, ids in zip(row.contexts, made.contexts, strict=True):
        prompt = tokenizer.apply_chat_template(context, add_generation_prompt=True, return_dict=False)
        assert prompt[: len(ids)] == ids


def kinds_of_tokenizers():
    """With and without bytes, normalization, and marks of beginnings; added tokens that overlap, nest and take spaces."""
    added = [
        "<a>",
        "<a><b>",
        "b><c",
        "<c>",
        AddedToken("<n>", normalized=True, special=True),
        AddedToken("plain", special=False),
    ]
    added += [AddedToken("<l>", special=True, lstrip=True), AddedToken("<r>", special=True, rstrip=True)]
    byte = make_tokenizer()
    spaced, words = Backend(models.Unigram()), Backend(models.WordPiece(unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.pre_tokenizer, words.normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    spaced.train_from_iterator(
        CORPUS * 9, trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", show_progress=False)
    )
    words.train_from_iterator(CORPUS * 9, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["<unk>"]))
    made = [byte, *(PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>") for t in (spaced, words))]
    for tokenizer in made:
        tokenizer.add_tokens([t for t in added if isinstance(t, AddedToken)])
        tokenizer.add_special_tokens({"extra_special_tokens": [t for t in added if isinstance(t, str)]})
    return made


@pytest.mark.parametrize("tokenizer", kinds_of_tokenizers(), ids=["bytes", "spaced", "words"])
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_ids_of_texts_in_parts_are_those_of_each_text_in_one_piece(tokenizer, texts):
    for special in (False, True):
        expected = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        tokenizer.backend_tokenizer.enable_truncation(3)  # as files of tokenizers may have it
        tokenizer.backend_tokenizer.enable_padding(length=5)
        assert list(token_ids(tokenizer, [texts], add_special_tokens=special)) == [expected]


# Layout


def test_truncation_cuts_the_end_of_the_output_to_the_longest_path():
    tokenized = Tokenized([[1, 5], [1, 2, 3, 4], [1, 2, 6]], [7, 8, 9], [-100, 8, 9])
    for max_length, output in ((7, [7, 8, 9]), (6, [7, 8])):
        prepared = layout(max_length=max_length)([tokenized], "para", [None])
        assert prepared["input_ids"] == [1, 5, 2, 3, 4, 6, *output]
        assert prepared["labels"] == [-100] * 7 + output[1:]
        example = example_of(prepared)
        paths = [sum(example.segments[i].length for i in example.path(b.segment)) for b in example.branches]
        assert max(paths) + example.segments[-1].length <= max_length
    for max_length in (5, 4, 1):
        with pytest.raises(RowDropped, match="no label left within max_length"):
            layout(max_length=max_length)([tokenized], "para", [None])
    with pytest.raises(RowDropped, match="^no label$"):
        layout()([Tokenized([[1]], [2], [-100])], "para", [None])
    assert layout(max_length=None)([tokenized], "para", [None])["input_ids"][-3:] == [7, 8, 9]


@pytest.mark.parametrize(
    ("full_context_weight", "given", "expected"),
    [
        (None, None, [1 / 3, 1 / 3, 1 / 3]),
        (0.5, None, [0.5, 0.25, 0.25]),
        (0.1, None, [0.1, 0.45, 0.45]),
        (0.5, [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        (None, [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
    ],
)
def test_weights(full_context_weight, given, expected):
    tokenized = Tokenized([[1, 2], [3], [1, 4]], [5, 6], [-100, 6])
    prepared = layout(full_context_weight=full_context_weight)([tokenized], "para", [given])
    assert [branch.weight for branch in example_of(prepared).branches] == pytest.approx(expected)


def test_one_context_of_para_is_a_plain_causal_run():
    prepared = layout(full_context_weight=0.5)([Tokenized([[1, 2]], [5, 6], [-100, 6])], "para", [[1.0]])
    example = example_of(prepared)
    assert not example.branches
    assert len(example.segments) == 1
    assert prepared["labels"] == [-100, -100, -100, 6]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 101])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_chunks_are_cut_as_array_split_cuts(length, chunks):
    probs = tuple(float(i == chunks - 1) for i in range(4))
    tokens = list(range(1, length + 1))
    prepared = layout(chunk_probs=probs)([Tokenized([tokens], [1001, 1002], [-100, 1002])], "succ", [None])
    example = example_of(prepared)
    expected = [part.tolist() for part in np.array_split(tokens, min(chunks, length))]
    assert prepared["input_ids"] == [*tokens, 1001, 1002]
    assert prepared["labels"] == [-100] * (length + 1) + [1002]
    if len(expected) == 1:
        assert not example.branches
        return
    *segments, output = example.segments
    assert [segment.length for segment in segments] == [len(part) for part in expected]
    # successive positions: chunks and output stand where they stand unsplit
    positions = [segment.start + t for segment in example.segments for t in range(segment.length)]
    assert positions == list(range(length + 2))
    assert [(branch.segment, branch.offset) for branch in example.branches] == [(i, 0) for i in range(len(segments))]
    assert [branch.weight for branch in example.branches] == pytest.approx([1 / len(segments)] * len(segments))


def chunks_of(make, tokens, output=(1, 2)):
    example = example_of(make([Tokenized([list(tokens)], list(output), [-100, *output[1:]])], "succ", [None]))
    return max(1, len(example.branches))


@pytest.mark.parametrize("probs", [(0.55, 0.15, 0.15, 0.15), (0.25, 0.25, 0.25, 0.25), (0.0, 0.7, 0.0, 0.3)])
def test_chunk_draws_follow_their_probabilities(probs):
    n, make = 5000, layout(chunk_probs=probs, seed=3)
    counts = Counter(chunks_of(make, [i, *range(10)]) for i in range(n))
    expected = {k + 1: n * p for k, p in enumerate(probs) if p}
    assert set(counts) == set(expected)
    chi_square = sum((counts[k] - e) ** 2 / e for k, e in expected.items())
    assert chi_square < 16.3  # 3 degrees of freedom: p = 0.001


def test_chunk_draws_depend_on_the_seed_and_on_the_whole_row():
    def draws(seed, output):
        return [chunks_of(layout(chunk_probs=(0.5, 0.5), seed=seed), [i, 1, 2, 3], output) for i in range(60)]

    assert draws(0, (1, 2)) == draws(0, (1, 2))
    assert draws(0, (1, 2)) != draws(1, (1, 2))
    assert draws(0, (1, 2)) != draws(0, (1, 3))


def test_para_draws_follow_para_prob_and_the_row():
    rows = [ContextRow([f"prompt {i}"], f"answer {i}") for i in range(5000)]
    for prob in (0.0, 0.3, 1.0):
        drawn = [layout(para_prob=prob).is_mixed(row) for row in rows]
        assert sum(drawn) == pytest.approx(5000 * prob, abs=4 * (5000 * prob * (1 - prob)) ** 0.5)
    few = layout(para_prob=0.3)
    drawn = [few.is_mixed(row) for row in rows]
    assert [few.is_mixed(row) for row in rows[::-1]] == drawn[::-1]
    assert [layout(para_prob=0.3, seed=1).is_mixed(row) for row in rows] != drawn
    # fewer rows are mixed at a lower probability, never others; messages count by what they say
    assert all(layout(para_prob=0.6).is_mixed(row) for row, mixed in zip(rows, drawn, strict=True) if mixed)
    chat = ContextRow([[user("a")]], [assistant("b")])
    filled = ContextRow([[user("a") | {"tool_calls": None}]], [assistant("b") | {"tool_calls": None}])
    assert [layout(para_prob=p / 100).is_mixed(chat) for p in range(100)] == [
        layout(para_prob=p / 100).is_mixed(filled) for p in range(100)
    ]


def test_columns_are_those_of_the_dataset():
    prepared = layout()([Tokenized([[1, 2]], [3], [3])], "single", [None])
    assert prepared == columns([1, 2, 3], [-100, -100, 3], example_of(prepared)) | {"miso_cut": [0], "miso_notes": []}
