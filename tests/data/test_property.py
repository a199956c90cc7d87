"""For any row: context + output of one context is what SFTTrainer trains on, token for token and label for label."""

import string
from functools import cache

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.data.test_tokenization import SPECIAL, TEMPLATES, assistant, layout, make_tokenizer, tokenize, user
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.data.contexts import full_row
from trl_miso.data.schema import RowDropped
from trl_miso.segments import decode

# Many rows an example, since trainers are made for each: shrinking would take minutes, so the rows that differ are named.
few = settings(
    max_examples=3,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

# Texts

WORDS = ["the sea", "a ship", "Answer:", " ", "  ", "\n", "\n\n", "\r\n", "\t", ".", "!", "e", "\u2581", "\ufffd", "\0"]
WORDS += ["\u00e9", "e\u0301", "\U0001f469\u200d\U0001f680", "\u05e9", "\u4e2d\u6587", "\ufeff", "\u2028", "\xa0"]
# what separates turns in the templates, where it belongs and where it does not
WORDS += [*SPECIAL, "<|user|>\n", "<|assistant|>\n", "\n\n### Response:\n", "[INST] ", " [/INST]", "<think>", "<0x0A>"]
WORDS += ["<s>", "</s>", "<unk>", "<|im_", "{{ 1 }}", "{% generation %}"]
texts = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6)
texts = texts.map("".join)
borders = st.sampled_from(["", " ", "\n", "\n\n", "\t "])
said = st.tuples(borders, texts.filter(str.strip), borders).map("".join)  # what is blank is dropped: seldom enough
spoken = st.one_of(*[said] * 7, texts)

systems = st.lists(texts.map(lambda text: {"role": "system", "content": text}), max_size=1)
exchanges = st.lists(st.tuples(texts.map(user), texts.map(assistant)), max_size=2)


@st.composite
def chats(draw):
    earlier = [message for exchange in draw(exchanges) for message in exchange]
    prompt = [*draw(systems), *earlier, user(draw(spoken))]
    return {"prompt": prompt, "completion": [assistant(draw(spoken))]}


plain = st.fixed_dictionaries({"prompt": spoken, "completion": spoken})
# SFTTrainer puts a second BOS before such prompts, MISO does not (test_plain_text_has_one_bos_and_one_eos).
plain = plain.filter(lambda row: not row["prompt"].startswith(("<|bos|>", "<s>")))

# Tokenizers


@cache
def metaspace_tokenizer(kind="llama2", template=None):
    """SentencePiece's ways: spaces as U+2581, other characters as bytes, a space before text of its own.

    Kind `"llama2"` writes it before every text between special tokens, `"first"` before the first alone.
    """
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *SPECIAL])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581.,!?:'#[]/<>|_", *string.ascii_letters]:
        vocab.setdefault(token, len(vocab))
    merges = [("\u2581", "\u2581"), ("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("s", "e"), (".", "\u2581")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        spaces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        spaces = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    backend.decoder = decoders.Sequence(spaces)
    bos = ("<s>", vocab["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATES.get(template),
        model_max_length=100_000,
    )


@cache
def tokenizer_of(name):
    kind, _, template = name.partition(" ")
    return make_tokenizer(template) if kind == "bytes" else metaspace_tokenizer(kind, template)


CHAT = [f"bytes {template}" for template in TEMPLATES]
CHAT += [f"{kind} {template}" for kind in ("llama2", "first") for template in ("no_generation_prompt", "qwen3")]
PLAIN = ["bytes", "llama2", "first"]

# Trainers


def trained_on(cls, rows, tokenizer, folder, **config):
    """`{number: prepared row}`, as a trainer of this class prepares them; SFTTrainer's rows are told by their column."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    if not isinstance(rows, IterableDataset):
        rows = Dataset.from_list([row | {"number": i} for i, row in enumerate(rows)])
    config_cls = SFTConfig if cls is SFTTrainer else MISOSFTConfig
    defaults = {"report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1, "disable_tqdm": True}
    args = config_cls(str(folder), **defaults | config)
    made = cls(model, args, train_dataset=rows, processing_class=tokenizer).train_dataset
    if cls is SFTTrainer:
        return {row["number"]: (row["input_ids"], row["labels"]) for row in made}
    return {row["miso_row"][0]: row for row in made}


def learned(rows):
    return {number: (row["input_ids"], row["labels"]) for number, row in rows.items()}


def directly(rows, tokenizer, mode, **options):
    """`{number: (ids, labels)}` by `Tokenizer` and `Layout` alone, and the reasons for which rows are dropped."""
    kept, reasons = {}, {}
    for number, row in enumerate(rows):
        try:
            kept[number] = full_row(row, "prompt")
        except RowDropped as reason:
            reasons[number] = str(reason)
    made, lay_out = {}, layout(chunk_probs=(1.0,), **options)
    for number, tokenized in zip(kept, tokenize(tokenizer, list(kept.values())), strict=True):
        try:
            if isinstance(tokenized, RowDropped):
                raise tokenized
            columns = lay_out([tokenized], mode, [None])
            made[number] = columns["input_ids"], columns["labels"]
        except RowDropped as reason:
            reasons[number] = str(reason)
    return made, reasons


def blank(row):
    """Whether MISO drops the row for what it says, which is nothing: TRL trains on such rows."""
    sides = row["prompt"], row["completion"]
    return not all((side if isinstance(side, str) else "".join(m["content"] for m in side)).strip() for side in sides)


def begins_as_a_lost_end(row):
    """Whether TRL may take the beginning of the answer for the end of Gemma 4's prompt (`<think>`), which the row lacks."""
    answer = row["completion"]
    return not isinstance(answer, str) and answer[0]["content"].strip().startswith("<")


def check_single(rows, tokenizer, folder):
    """One context, whole and then cut, by every way that leads to it."""
    whole = trained_on(SFTTrainer, rows, tokenizer, folder, max_length=None)
    middle = sorted(len(ids) for ids, _ in whole.values())[len(whole) // 3]
    cut = trained_on(SFTTrainer, rows, tokenizer, folder, max_length=middle)
    assert max(len(ids) for ids, _ in cut.values()) == middle
    for max_length, expected in ((None, whole), (middle, cut)):
        for mode in ("single", "succ", "para"):
            made, reasons = directly(rows, tokenizer, mode, max_length=max_length)
            assert sorted([*made, *reasons]) == list(range(len(rows)))
            for number, reason in reasons.items():
                if blank(rows[number]):
                    assert reason in ("an empty context", "no output: the completion is empty")
                elif number in expected:
                    # the whole row does not begin as its prompt does: nothing would be left of what is asked
                    assert reason == "an empty context"
                    assert -100 not in expected[number][1]
                else:
                    assert reason in ("no label", "no label left within max_length")
            compared = [n for n in expected if n not in reasons and not begins_as_a_lost_end(rows[n])]
            assert {*made} == {*expected} - {*reasons}
            assert {n: made[n] for n in compared} == {n: expected[n] for n in compared}, mode
        options = {"max_length": max_length, "context_mode": "single"}
        trained = learned(trained_on(MISOSFTTrainer, rows, tokenizer, folder, **options))
        assert trained == {number: row for number, row in expected.items() if not blank(rows[number])}


@pytest.mark.parametrize("name", CHAT)
def test_one_context_of_any_chat_is_what_sft_trains_on(name, tmp_path):
    @few
    @given(st.lists(chats(), min_size=12, max_size=16))
    def check(rows):
        check_single(rows, tokenizer_of(name), tmp_path)

    check()


@pytest.mark.parametrize("name", PLAIN)
def test_one_context_of_any_plain_text_is_what_sft_trains_on(name, tmp_path):
    @few
    @given(st.lists(plain, min_size=12, max_size=16))
    def check(rows):
        check_single(rows, tokenizer_of(name), tmp_path)

    check()


# Several contexts


def first_context_and_output(row):
    """Ids and labels along the path of the first context."""
    (example,) = decode(row["miso_layout"])
    bounds = [0]
    for segment in example.segments:
        bounds.append(bounds[-1] + segment.length)
    last = len(example.segments) - 1
    path = [*example.path(example.branches[0].segment), last] if example.branches else [last]
    spans = [range(bounds[i], bounds[i + 1]) for i in path]
    return tuple([row[column][at] for span in spans for at in span] for column in ("input_ids", "labels"))


def in_contexts(prompt, others):
    """The prompt, and the same conversation with other last turns."""
    if isinstance(prompt, str):
        return [prompt, *others]
    return [prompt, *([*prompt[:-1], user(other)] for other in others)]


@pytest.mark.parametrize("name", CHAT)
def test_the_first_of_several_contexts_is_what_sft_trains_on(name, tmp_path):
    tokenizer = tokenizer_of(name)
    mixed = 0

    @few
    @given(st.lists(st.tuples(chats(), st.lists(said, min_size=1, max_size=3)), min_size=12, max_size=16))
    def check(drawn):
        nonlocal mixed
        rows = [row | {"contexts": in_contexts(row["prompt"], others)} for row, others in drawn]
        expected = trained_on(SFTTrainer, [row for row, _ in drawn], tokenizer, tmp_path, max_length=None)
        made = trained_on(MISOSFTTrainer, rows, tokenizer, tmp_path, max_length=None, context_mode="para")
        for number, row in made.items():
            if not begins_as_a_lost_end(rows[number]):
                assert first_context_and_output(row) == expected[number]
        mixed += sum(bool(next(decode(row["miso_layout"])).branches) for row in made.values())

    check()
    assert mixed > 20


def test_the_first_of_several_contexts_of_plain_text(tmp_path):
    end = "\n\n### Response:\n"
    tokenizer = tokenizer_of("bytes")

    @few
    @given(st.lists(st.tuples(plain, st.lists(said, min_size=1, max_size=3)), min_size=12, max_size=16))
    def check(drawn):
        asked = [row | {"prompt": row["prompt"] + end} for row, _ in drawn]
        contexts = [in_contexts(row["prompt"] + end, [other + end for other in others]) for row, others in drawn]
        rows = [row | {"contexts": made} for row, made in zip(asked, contexts, strict=True)]
        expected = trained_on(SFTTrainer, asked, tokenizer, tmp_path, max_length=None)
        options = {"max_length": None, "context_mode": "para", "response_template": end}
        made = trained_on(MISOSFTTrainer, rows, tokenizer, tmp_path, **options)
        assert {number: first_context_and_output(row) for number, row in made.items()} == {
            number: row for number, row in expected.items() if number in made
        }

    check()


# Ways to the same examples


def test_streams_and_processes_give_the_examples_of_datasets(tmp_path):
    tokenizer, in_processes = tokenizer_of("bytes qwen3"), 0

    @few
    @given(st.lists(st.tuples(chats(), st.lists(said, min_size=1, max_size=3)), min_size=12, max_size=16))
    def check(drawn):
        nonlocal in_processes
        rows = [row | {"contexts": in_contexts(row["prompt"], others)} for row, others in drawn]
        for mode in ("para", "succ", "single", "augment"):
            options = {"max_length": 60, "context_mode": mode} | ({"para_prob": 0.8} if mode == "para" else {})
            expected = trained_on(MISOSFTTrainer, rows, tokenizer, tmp_path, **options)
            streamed = IterableDataset.from_generator(lambda: iter(rows))
            assert trained_on(MISOSFTTrainer, streamed, tokenizer, tmp_path, **options) == expected
            if in_processes < 1:  # they take a second to start
                in_processes += 1
                assert trained_on(MISOSFTTrainer, rows, tokenizer, tmp_path, dataset_num_proc=2, **options) == expected

    check()
