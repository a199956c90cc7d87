"""Measured attention against dense attention in float64, the parts of prompts, dilution by eqs. 5 and 6, the relation to verdicts."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.data.test_tokenization import TEMPLATES, make_tokenizer
from tests.support.models import tiny_model
from trl_miso.attention import transformers_attention
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped
from trl_miso.report import Sampler, measure, meters
from trl_miso.report.constraint_checks import ifeval_check
from trl_miso.report.dilution import equation_6, masses, output_share
from trl_miso.report.measure import Mixture, generate_answer
from trl_miso.report.prompt_parts import read_prompt
from trl_miso.report.relation import paired_difference, relation

CONSTRAINTS = ["Use commas.", "Do not Use commas. Ever.", "Ends 😀 here", "\u05e9\u05dc\u05d5\u05dd"]
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "user"}
SHOT = [USER, {"role": "assistant", "content": "assistant"}]


def chat_row(constraints=CONSTRAINTS, before=(SYSTEM, *SHOT), base="Write <|x|>\nabout it.", **columns):
    prompt = [*before, {"role": "user", "content": base}]
    completion = [{"role": "assistant", "content": "It is, in short, here."}]
    return {"prompt": prompt, "constraints": constraints, "completion": completion} | columns


@pytest.fixture
def sampler(tokenizer, make_config):
    def make(kind="constraints", tokenizer=tokenizer, own_answers=False, **settings):
        return Sampler(tokenizer, DataOptions.of(make_config(**settings)), kind, own_answers)

    return make


def texts_of_parts(prompted, tokenizer):
    """The text of the tokens of each part."""
    ids = [[] for _ in prompted.parts]
    for token, owner in zip(prompted.ids, prompted.owners, strict=True):
        ids[owner].append(token)
    return [tokenizer.decode(tokens) for tokens in ids]


# Parts


@pytest.mark.parametrize("template", ["synthetic", *sorted(set(TEMPLATES) - {"tools"})])
def test_tokens_have_the_text_of_their_part(template, tokenizer, sampler):
    if template != "synthetic":
        tokenizer = make_tokenizer(template)
    sample = sampler(tokenizer=tokenizer)(chat_row(), 0)
    prompted = sample.prompted
    # Without a generation prompt the output begins with the prompt's last token.
    assert prompted.ids[-len(sample.head) :] == sample.head
    assert len(prompted.ids) == len(prompted.owners)
    texts = [text.strip() for text in texts_of_parts(prompted, tokenizer)]
    assert [part.kind for part in prompted.parts[2:]] == ["system", "earlier", "earlier", "base", *["constraint"] * 4]
    assert texts[2:] == ["Be brief.", "user", "assistant", "Write <|x|>\nabout it.", *CONSTRAINTS]
    assert [part.text for part in prompted.parts[2:]] == texts[2:]
    conversation = sample.row["prompt"][:1]
    before, after = (
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=g) for g in (0, 1)
    )
    assert after[len(before) :].strip().startswith(texts[0])  # the output begins with the generation prompt
    assert bool(texts[0]) == (before != after)
    assert "commas" not in texts[1]


@pytest.mark.parametrize(("prompt", "template"), [("Write.", None), ("Write.\n### Response:\n", "\n### Response:\n")])
def test_plain_text_has_the_same_parts(prompt, template, tokenizer, sampler):
    row = {"prompt": prompt, "constraints": ["In A.", "In B."], "completion": " Yes."}
    prompted = sampler(response_template=template)(row, 0).prompted
    texts = [text.strip() for text in texts_of_parts(prompted, tokenizer)]
    assert texts == [(template or "").strip(), "", "Write.", "In A.", "In B."]


@pytest.mark.parametrize("own_answers", [False, True])
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("constraints", {"prompt": "Write.", "constraints": ["Be brief.", "Rhyme."]}),
        ("constraints", {"prompt": "Write.", "full_prompt": "Write. Rhyme.", "constraints": ["Rhyme."]}),
        ("contexts", {"contexts": ["Write about it:", "Write in rhymes:"]}),
        ("contexts", {"contexts": ["Write about it:", "Write in rhymes:"], "prompt": "Write in rhymes:"}),
        ("prompt-completion", {"prompt": "Write about it:"}),
    ],
)
def test_a_bos_in_plain_text_is_the_one_that_the_tokenizer_adds(kind, row, own_answers, sampler):
    tokenizer = make_tokenizer("chatml")
    bos = tokenizer.bos_token
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    row = row | {"completion": " It is."}
    begun = {name: bos + row[name] for name in ("prompt", "full_prompt") if name in row}
    if "contexts" in row:
        begun["contexts"] = [bos + context for context in row["contexts"]]
    make = sampler(kind, tokenizer, own_answers)
    expected, sample = make(row, 0), make(row | begun, 0)
    assert sample.prompted == expected.prompted and sample.contexts == expected.contexts
    assert (sample.answer, sample.head, sample.names) == (expected.answer, expected.head, expected.names)
    assert sample.prompted.ids.count(tokenizer.bos_token_id) == 1


def test_parts_of_a_handwritten_prompt_are_located(tokenizer):
    """The list of constraints may come first, and the base instruction may repeat a constraint."""
    text = "- Use commas.\n- Be kind.\n\nQuery:\nUse commas. Write."
    prompt = [{"role": "user", "content": text}]
    prompted = read_prompt(tokenizer, prompt, "Use commas. Write.", ["Use commas.", "Be kind."], None, {})
    texts = texts_of_parts(prompted, tokenizer)
    assert [texts[i].strip() for i in (2, 3, 4)] == ["Use commas. Write.", "Use commas.", "Be kind."]
    assert prompted.owners.index(3) < prompted.owners.index(4) < prompted.owners.index(2)


def test_a_base_instruction_may_be_interrupted(tokenizer):
    """As in rows of `trl-miso decompose`: its pieces are one part, and words that join a constraint are of the rest."""
    text = "Write a poem, in French please, about the sea. Also, be kind. Use rain.\n\nThe sea is blue."
    prompt = [{"role": "user", "content": text}]
    base = "Write a poem about the sea. Use rain.\n\nThe sea is blue."
    prompted = read_prompt(tokenizer, prompt, base, ["in French please", "be kind."], None, {})
    texts = texts_of_parts(prompted, tokenizer)
    texts = [re.sub(r"\W", "", part) for part in texts]
    assert texts[2:] == [re.sub(r"\W", "", base), "inFrenchplease", "bekind"] and "Also" in texts[1]
    with pytest.raises(RowDropped, match="the base instruction that is not"):
        read_prompt(tokenizer, prompt, base + " Please.", ["be kind."], None, {})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"constraints": []}, "no constraints"),
        (
            {"full_prompt": [{"role": "user", "content": "Write <|x|>\nabout it. Reworded."}]},
            "a constraint that is not",
        ),
        ({"full_prompt": [{"role": "user", "content": "\n".join(CONSTRAINTS)}]}, "the base instruction that is not"),
        ({"base": "Write: Use commas. Now."}, "stands within|more than once"),
        ({"constraints": ["a word " * 500]}, "more tokens than max_length"),
    ],
)
def test_rows_without_locatable_parts_are_dropped(columns, reason, sampler):
    with pytest.raises(RowDropped, match=reason):
        sampler(max_length=900)(chat_row(**columns), 0)


def test_constraints_that_the_prompt_holds_are_parts(tokenizer, sampler):
    row = chat_row(["Use commas.", "Be kind."], (), "Write. Use commas.\nBe kind.")
    sample = sampler()(row, 0)
    texts = [text.strip() for text in texts_of_parts(sample.prompted, tokenizer)]
    assert texts[2:] == ["Write.", "Use commas.", "Be kind."]
    assert sample.names == ["full", "constraint 1", "constraint 2", "bare"]


def test_every_context_has_a_name(sampler):
    names = {"full", "constraint 1", "constraint 2", "bare"}
    row = chat_row(["Use commas.", "Be kind."])
    assert set(sampler()(row, 0).names) == names
    assert set(sampler(include_bare=False)(row, 0).names) == names - {"bare"}
    assert set(sampler(include_full=False)(row, 0).names) == names - {"full"}
    assert sampler()(chat_row(["Use commas."]), 0).names == ["full", "bare"]  # the constraint alone is the full prompt
    assert sampler(full_context_weight=0.4)(row, 0).weights == pytest.approx([0.4, 0.2, 0.2, 0.2])
    given = {"contexts": ["One. Say:", "Two. Say:"], "completion": " Yes."}
    assert sampler("contexts")(given, 0).names == ["full", "context 2"]
    moved = {"prompt": "Two. Say:", "contexts": ["One. Say:", "Two. Say:", "Three. Say:"], "completion": " Yes."}
    assert sampler("contexts")(moved, 0).names == ["full", "context 1", "context 3"]  # as in the column


# Masses


def by_eager(model, sample):
    """(L, H, U, P) from transformers' own attention matrices."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([sample.prompted.ids + sample.answer])
    with torch.no_grad():
        out = model.eval()(input_ids=ids, output_attentions=True)
    owners = torch.tensor(sample.prompted.owners + [0] * len(sample.answer))
    sums = torch.nn.functional.one_hot(owners, len(sample.prompted.parts)).double()
    first = len(sample.prompted.ids) - 1
    return torch.stack([layer[0, :, first:-1].double() @ sums for layer in out.attentions]).numpy()


@pytest.mark.parametrize("scores", [meters.SCORES_AT_ONCE, 2_000])
@pytest.mark.parametrize(("name", "overrides"), [("llama", {}), ("gemma2", {"sliding_window": 30}), ("qwen3", {})])
def test_masses_equal_dense_attention_and_sum_to_one(name, overrides, scores, sampler, monkeypatch):
    monkeypatch.setattr(meters, "SCORES_AT_ONCE", scores)
    sample = sampler()(chat_row(CONSTRAINTS[:1], ()), 7)
    model = tiny_model(name, torch.float64, attn_implementation="eager", **overrides)
    (measured,) = measure(model, [sample], max_length=1024, detailed=7)
    expected = by_eager(model, sample)
    assert measured.each.shape == expected.shape
    assert np.abs(measured.each - expected).max() < 1e-6
    assert np.abs(measured.each.sum(-1) - 1).max() < 1e-12
    assert np.abs(measured.parts - expected.mean(2)).max() < 1e-6
    assert np.abs(measured.answer - expected.mean((0, 1))).max() < 1e-6
    owners = np.array(sample.prompted.owners + [0] * len(sample.answer))
    per_part = np.stack(
        [measured.tokens[..., owners == part].sum(-1) for part in range(len(sample.prompted.parts))], -1
    )
    assert np.abs(per_part - measured.parts).max() < 1e-12


class Largest(TorchDispatchMode):
    """Records the largest number of elements in the output of an operation."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return outputs


def test_no_attention_matrix_is_kept(monkeypatch):
    length, heads = 600, 4
    monkeypatch.setattr(meters, "SCORES_AT_ONCE", 40_000)
    meter = meters.PartMeter(torch.randint(0, 5, (length,)), 5, 10, keep_tokens=True)
    with Largest() as largest:
        meter.read(torch.randn(1, heads, length, 8), torch.randn(1, 2, length, 8), 0.3, None, None)
    assert heads * length <= largest.elements <= 40_000


def test_branch_masses_equal_dense_attention(sampler, monkeypatch):
    """Computed from the queries and keys of contexts that share no segment, each before its own copy of the output."""
    sample = sampler()(chat_row(["Use commas.", "Be kind to all of them."], ()), 0)
    model = tiny_model("llama", torch.float64)
    (measured,) = measure(model, [sample], max_length=1024)
    layers = []

    def noting(q, k, v, packed, kernel, options, *rest):
        layers.append((q, k, packed, options.scale))
        return attend(q, k, v, packed, kernel, options, *rest)

    attend = transformers_attention.miso_attention
    monkeypatch.setattr(transformers_attention, "miso_attention", noting)
    with meters.measuring(model, 1024) as support:
        Mixture(model, replace(support, shares=False), "successive").shares(sample, sample.weights, "uniform")
    lengths = list(map(len, sample.contexts))
    ends = np.cumsum(lengths)
    size = len(sample.head) + len(sample.answer)
    for layer, (q, k, packed, scale) in enumerate(layers):
        assert packed.branch_kv_offset is None
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        output = slice(int(ends[-1]), int(ends[-1]) + size)
        hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
        to_output = (torch.einsum("qhd,khd->hqk", q[output], k[output]) * scale).masked_fill(hidden, -torch.inf)
        for branch, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            to_context = torch.einsum("qhd,khd->hqk", q[output], k[end - length : end]) * scale
            mass = torch.cat([to_context, to_output], -1).softmax(-1)[..., :length].sum(-1)
            answered = mass[:, len(sample.head) - 1 : -1].mean(1).numpy()
            assert np.abs(measured.branches[layer, :, branch] - answered).max() < 1e-6
    assert np.abs(measured.output - (1 - measured.branches.mean(-1))).max() < 1e-6


def test_the_first_layer_is_the_same_under_all_weightings(sampler):
    """There all weightings mix the same masses, one per context, and vanilla's share follows from them by eq. 6."""
    sample = sampler()(chat_row(["Use commas.", "Be kind."], ()), 0)
    model = tiny_model("llama", torch.float64, num_hidden_layers=1)
    measured = [next(measure(model, [sample], weighting=weighting)) for weighting in ("uniform", "fid", "vanilla")]
    for other in measured[1:]:
        assert np.abs(other.branches - measured[0].branches).max() < 1e-6
    assert list(measured[0].dilution) == [1, 2, 4]
    for line in measured[0].dilution.values():
        assert line["vanilla"] == pytest.approx(line["equation 6"], abs=1e-6)
        assert line["vanilla"] <= line["fid"] <= line["uniform"]
    assert measured[0].dilution[1]["uniform"] == pytest.approx(measured[0].parts[..., 0].mean(), abs=1e-6)


def test_alone_equals_a_row_with_a_single_constraint(sampler):
    both, *single = (
        sampler()(chat_row(constraints, ()), 0) for constraints in (CONSTRAINTS[:2], *map(list, zip(CONSTRAINTS[:2])))
    )
    first, *others = measure(tiny_model("llama"), [both, *single])
    assert first.alone == pytest.approx([measured.parts[..., -1].mean() for measured in others], abs=1e-6)
    assert first.alone[0] > first.parts[..., -2].mean()


def test_sliding_windows_limit_the_masses(sampler):
    """A context beyond the window has no mass; vanilla, one softmax over all contexts, has no windows and is not measured."""
    sample = sampler()(chat_row(["Use commas.", "Be kind."], ()), 0)
    narrow, wide = (
        next(measure(tiny_model("mistral", torch.float64, sliding_window=window, num_hidden_layers=1), [sample]))
        for window in (4, 500)
    )
    assert (narrow.branches < wide.branches).all()
    assert narrow.parts[..., 0].mean() > wide.parts[..., 0].mean()
    assert [line["vanilla"] is None for line in narrow.dilution.values()] == [False, True, True]
    assert narrow.dilution[1]["uniform"] == pytest.approx(narrow.parts[..., 0].mean(), abs=1e-6)


def test_given_contexts_are_measured(sampler):
    given = {"contexts": ["One thing. Say:", "Two. Say:"], "completion": " Yes."}
    sample = sampler("contexts")(given | {"context_weights": [3, 1]}, 0)
    (measured,) = measure(tiny_model("llama"), [sample])
    assert [part.kind for part in sample.prompted.parts] == ["output", "rest", "base"]
    assert measured.output == pytest.approx(1 - measured.branches @ np.array([0.75, 0.25]), abs=1e-5)


def test_measuring_restores_the_model(sampler):
    sample = sampler()(chat_row(), 0)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for _ in measure(model, [sample]):
        assert torch.is_grad_enabled()
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_models_that_cannot_be_trained_are_refused(sampler):
    with pytest.raises(ValueError, match="sinks"):
        next(measure(tiny_model("gpt_oss"), [sampler()(chat_row(), 0)]))


# Dilution


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_dilution_follows_equations_3_to_7(n):
    generator = np.random.default_rng(n)
    contexts = [np.exp(generator.normal(size=(3, generator.integers(1, 30)))) for _ in range(n)]
    out = np.exp(generator.normal(size=(3, 12))).sum(-1)
    sums = np.stack([scores.sum(-1) for scores in contexts], -1)
    mass = sums / (sums + out[:, None])
    vanilla = out / (sums.sum(-1) + out)  # eq. 5
    assert equation_6(mass) == pytest.approx(vanilla, rel=1e-12)
    assert output_share(mass, "vanilla") == pytest.approx(vanilla, rel=1e-12)
    weights = (sums + out[:, None]) / (sums + out[:, None]).sum(-1, keepdims=True)  # eq. 7
    assert output_share(mass, "fid") == pytest.approx((weights * (1 - mass)).sum(-1), rel=1e-12)
    assert output_share(mass, "uniform") == pytest.approx((1 - mass).mean(-1), rel=1e-12)
    one_softmax = sums / (sums.sum(-1) + out)[:, None]
    fixed = np.full(n, 1 / n)
    for weighting, share in (("vanilla", one_softmax), ("fid", weights * mass), ("uniform", fixed * mass)):
        assert masses(share, fixed, weighting) == pytest.approx(mass, rel=1e-9)


def test_only_vanilla_dilutes():
    lines = [
        {name: output_share(np.full(n, 0.6), name) for name in ("uniform", "fid", "vanilla")} for n in (1, 10, 1000)
    ]
    assert [line["uniform"] for line in lines] == pytest.approx([0.4] * 3)
    assert [line["fid"] for line in lines] == pytest.approx([0.4] * 3)
    assert [line["vanilla"] for line in lines] == pytest.approx([0.4, 1 / 16, 1 / 1501])
    assert equation_6(np.array([0.0, 0.0])) == 1
    assert equation_6(np.array([1.0, 0.5])) == 0


# Constraints that are followed


def test_the_auc_equals_a_count_of_pairs():
    generator = np.random.default_rng(0)
    values, rows = generator.integers(0, 6, 80), generator.integers(0, 15, 80)
    followed = generator.random(80) < 0.3 + values / 12
    result = relation(values, followed, rows)

    def pairs(same_row):
        wins = [
            (a > b) + (a == b) / 2
            for a, fa, ra in zip(values, followed, rows, strict=True)
            for b, fb, rb in zip(values, followed, rows, strict=True)
            if fa and not fb and (ra == rb or not same_row)
        ]
        return sum(wins) / len(wins)

    assert result["auc"][0] == pytest.approx(pairs(False))
    assert result["auc_in_row"][0] == pytest.approx(pairs(True))
    assert result["auc"][1] < result["auc"][0] < result["auc"][2]
    assert result["mean_followed"] == pytest.approx(values[followed].mean())
    assert relation(values, followed, rows) == result
    assert relation(values, ~followed, rows)["auc"][0] == pytest.approx(1 - pairs(False))


def test_small_samples_have_no_interval():
    followed = [True] * 9 + [False] * 30
    result = relation(range(39), followed, range(39))
    assert (result["followed"], result["auc"], result["auc_in_row"]) == (9, None, None)
    assert relation(range(40), [True, *followed], range(40))["auc"][0] < 0.1
    assert relation(range(40), [True, *followed], [1] * 40)["auc"] is None  # of one row
    assert relation([], [], [])["mean_followed"] is None
    assert paired_difference([1.0] * 9, [2.0] * 9) == {"rows": 9, "mean": 1.0, "interval": None}
    assert paired_difference([1.0] * 10, [2.0] * 10)["interval"] == [1.0, 1.0]


def test_only_rows_with_a_check_have_verdicts(sampler, punkt):
    columns = {"instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": "[{}, {}]"}
    constraints = ["No commas.", "In lowercase."]
    check = ifeval_check()
    followed = sampler()(chat_row(constraints, **columns), 0).answered([1], "It is, so.").followed(check)
    assert followed == [False, False]
    assert sampler()(chat_row(constraints, **columns), 0).answered([1], "it is so").followed(check) == [True, True]
    assert sampler()(chat_row([*constraints, "Be kind."], **columns), 0).followed(check) == [None] * 3
    assert sampler()(chat_row(constraints), 0).followed(check) == [None] * 2
    partly = columns | {"instruction_id_list": ["punctuation:no_comma", None]}
    assert sampler()(chat_row(constraints, **partly), 0).answered([1], "It is so.").followed(check) == [True, None]
    with pytest.raises(ValueError, match="1 verdicts on 2 constraints"):
        sampler()(chat_row(constraints), 0).followed(lambda row, answer: [True])


@pytest.mark.parametrize("template", ["synthetic", "gemma4"])
def test_own_answers_equal_generate(template, tokenizer, sampler):
    """Also with a template whose generation prompt differs from the beginning of an answer in a conversation."""
    if template != "synthetic":
        tokenizer = make_tokenizer(template)
    sample = sampler(tokenizer=tokenizer, own_answers=True)(chat_row(), 0)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    answered = generate_answer(model, tokenizer, sample, 6)
    text = "Write <|x|>\nabout it.\n\n" + "\n".join(CONSTRAINTS)
    conversation = [SYSTEM, *SHOT, {"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert sample.prompted.ids + answered.answer == out[0].tolist()
    assert sample.prompted.ids[-len(sample.head) :] == sample.head
    (measured,) = measure(model, [answered])
    assert len(measured.answer) == len(answered.answer) == measured.answer.shape[0]


def test_a_token_across_parts_belongs_to_its_last_character(tokenizer):
    """One tokenizer merges the end of a sentence with the line breaks after it, the other a space with the next word."""
    for reads, text, base, constraint in (
        (make_tokenizer("merging"), "the sea.\n\na ship", "the sea.\n\n", "a ship"),
        (tokenizer, "Write the word", "Write", " the word"),
    ):
        prompted = read_prompt(reads, [{"role": "user", "content": text}], base.strip(), [constraint.strip()], None, {})
        assert texts_of_parts(prompted, reads)[2:] == [base, constraint]
