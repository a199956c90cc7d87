"""Every answer of a conversation is trained, as inference sees it: all templates that TRL ships x conversations."""

import pytest
from trl.chat_template_utils import has_generation_markers

from tests.support.conversations import CONVERSATIONS, TEMPLATES, TOOLS, tokenizer_for
from tests.support.rows_oracle import parts_of
from trl_miso.data.contexts import full_row
from trl_miso.data.layout import Layout
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped, has_content
from trl_miso.data.tokenization import OTHER_END, RowTokenizer
from trl_miso.data.turns import earlier_answers
from trl_miso.segments import decode, single

_TOKENIZERS = {}


def tokenizer_of(name):
    return _TOKENIZERS.setdefault(name, tokenizer_for(TEMPLATES[name]))


def prepare(tokenizer, messages, kind="plain", **options):
    """The prepared columns of a conversation; raises what preparation raises."""
    options = DataOptions(**options)
    row = {"messages": messages}
    full = full_row(row, "messages", options)
    answers = [*earlier_answers(row, "messages", options, full), full]
    kwargs = {"tools": TOOLS if kind == "tools" else None}
    rows = RowTokenizer(tokenizer, assistant_only_loss=options.assistant_only_loss)
    tokenized = rows(answers, [kwargs] * len(answers))
    for one in tokenized:
        if isinstance(one, RowDropped):
            raise one
    return Layout(options)(tokenized, "single", [None] * len(answers))


def trained(prepared):
    """(tokens before, labelled tokens) of every run of labels, by walking the prepared row's segments."""
    runs = []
    for parts in parts_of(prepared):
        start = None
        for i, label in enumerate([*parts.labels, -100]):
            if label != -100 and start is None:
                start = i
            elif label == -100 and start is not None:
                runs.append((parts.output[:start], parts.output[start:i]))
                start = None
    return runs


def answers_of(messages):
    requests = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and has_content(m) and i > requests[0]]


def each(tokenizer, messages, kind):
    """The prepared row, or a skip with the reason for which the template refuses it."""
    try:
        return prepare(tokenizer, messages, kind)
    except (RowDropped, ValueError) as reason:
        pytest.skip(f"refused: {str(reason)[:150]}")


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_trained_as_inference_sees_it(name, kind):
    tokenizer, messages = tokenizer_of(name), CONVERSATIONS[kind]
    prepared = each(tokenizer, messages, kind)
    runs = trained(prepared)
    kwargs = {"tools": TOOLS} if kind == "tools" else {}
    prompts = {}
    for i in answers_of(messages):
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False, **kwargs)
        whole = tokenizer.apply_chat_template(messages[: i + 1], return_dict=False, **kwargs)
        prompts[i] = prompt, whole
    if any(note.startswith(OTHER_END) for note in prepared["miso_notes"]):
        # What inference shows is not in the conversation: the answers alone are labelled.
        assert not any(text in tokenizer.decode(run) for _, run in runs for text in user_texts(messages))
        return
    expected = sorted((prompt, whole[len(prompt) :]) for prompt, whole in prompts.values())
    assert len(runs) == len(expected)
    for (before, run), (prompt, answer) in zip(sorted(runs), expected, strict=True):
        assert before == prompt, "the context is what inference shows"
        assert run == answer[: len(run)]
        rest = tokenizer.decode(answer[len(run) :])  # templates may add tokens after the last turn
        assert rest in ("", "\n", "<|endoftext|>", tokenizer.eos_token)


def user_texts(messages):
    return [message["content"] for message in messages if message["role"] in ("user", "system", "tool")]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_but_answers_is_labelled(name, kind):
    """No text of another turn, and the text of each answer once; with TRL's masks and without."""
    tokenizer, messages = tokenizer_of(name), CONVERSATIONS[kind]
    prepared = [each(tokenizer, messages, kind)]
    if has_generation_markers(tokenizer.chat_template):
        prepared.append(prepare(tokenizer, messages, kind, assistant_only_loss=True))
    for row in prepared:
        labelled = "".join(tokenizer.decode(run) for _, run in trained(row))
        assert not any(text in labelled for text in user_texts(messages))
        for i in answers_of(messages):
            text = messages[i]["content"].rpartition("</think>")[2].strip()
            assert labelled.count(text) == 1 or not text


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if has_generation_markers(TEMPLATES[name])])
def test_labels_are_those_of_sft_with_assistant_only_loss(name, kind):
    """Token for token, but for the assistant's header where a template's markers hold it: inference shows it."""
    tokenizer, messages = tokenizer_of(name), CONVERSATIONS[kind]
    each(tokenizer, messages, kind)
    prepared = prepare(tokenizer, messages, kind, assistant_only_loss=True)
    kwargs = {"tools": TOOLS} if kind == "tools" else {}
    sft = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **kwargs)
    if list(decode(prepared["miso_layout"])) != [single(len(sft["input_ids"]))]:
        # SFT trains an answer as later turns see it, without its thinking or with another end.
        ends = [
            tokenizer.apply_chat_template(messages[: i + 1], return_dict=False, **kwargs) for i in answers_of(messages)
        ]
        assert any(sft["input_ids"][: len(end)] != end for end in ends)
        return
    assert prepared["input_ids"] == sft["input_ids"]
    labelled = [label != -100 for label in prepared["labels"]]
    assert all(mask or not label for mask, label in zip(sft["assistant_masks"], labelled, strict=True))
    headers = [
        t for t, m, label in zip(sft["input_ids"], sft["assistant_masks"], labelled, strict=True) if m and not label
    ]
    before = messages[: answers_of(messages)[0]]
    prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False, **kwargs)
    for text in tokenizer.batch_decode([[token] for token in headers]):
        assert text in prompt


def test_all_templates_are_tried():
    """The tests above skip what is refused: enough is trained, and what is refused is refused for a known reason."""
    counts = {"trained": 0}
    for name in TEMPLATES:
        for kind, messages in CONVERSATIONS.items():
            try:
                prepare(tokenizer_of(name), messages, kind)
                counts["trained"] += 1
            except (RowDropped, ValueError) as error:
                reason = str(error).partition("(")[0].partition("'")[0].partition(", expected")[0].strip()
                counts[reason] = counts.get(reason, 0) + 1
    assert counts.pop("trained") > 0.6 * len(TEMPLATES) * len(CONVERSATIONS)
    assert set(counts) == {
        "the chat template leaves out the reasoning of the answer",
        "the chat template renders the prompt differently once it is answered",
        "Got messages that the chat template cannot render",
        "Got a turn of role",
        "Got 1 tools in column",
    }


MESSAGES = CONVERSATIONS["long"]


@pytest.mark.parametrize(
    ("kind", "row", "setting", "answers"),
    [
        ("messages", {"messages": MESSAGES}, "auto", 4),
        ("messages", {"messages": MESSAGES}, "last", 1),
        ("messages", {"messages": MESSAGES, "train_turns": "last"}, "auto", 1),
        ("messages", {"messages": MESSAGES, "train_turns": "last"}, "all", 4),
        ("messages", {"messages": MESSAGES, "train_turns": None}, "auto", 4),
        ("constraints", {"messages": MESSAGES, "constraints": ["Rhyme."]}, "auto", 4),
        ("prompt", {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}, "auto", 1),
        ("prompt", {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}, "all", 4),
        ("prompt", {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:], "train_turns": "all"}, "auto", 4),
        ("contexts", {"contexts": [MESSAGES[:-1], MESSAGES[:1]], "completion": MESSAGES[-1:]}, "all", 4),
        ("prompt", {"prompt": "a b", "completion": "c"}, "all", 1),
    ],
)
def test_the_setting_and_the_row_say_which_answers_are_trained(kind, row, setting, answers):
    options = DataOptions(train_turns=setting)
    full = full_row(row, kind, options)
    assert 1 + len(earlier_answers(row, kind, options, full)) == answers


def test_an_unknown_value_in_the_column_is_an_error():
    row = {"messages": MESSAGES, "train_turns": "some"}
    with pytest.raises(ValueError, match="Got 'some' in column 'train_turns', expected one of auto, all, last"):
        earlier_answers(row, "messages", DataOptions(), full_row(row, "messages"))
