"""Generation from several contexts equals a forward without a cache, and one row per context; with one context, the plain model."""

import random
import runpy
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from tests.support.models import tiny_model
from tests.support.rows_oracle import NAME, positions_of
from trl_miso.attention import register_miso_attention
from trl_miso.attention.kernels import KERNELS, Cpu
from trl_miso.attention.support import prepare_model
from trl_miso.data.collator import MISODataCollator
from trl_miso.generation import decoding, miso_generate
from trl_miso.segments import encode, parallel, unshare
from trl_miso.segments.packed import WEIGHTINGS

CONTEXTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8], [5, 6, 20, 21, 22], [5, 6]]
HEAD = [2, 3]
ARCHITECTURES = ["llama", "qwen3", "gemma3", "phi", "cohere2", "gemma4", "smollm3", "gpt_neox", "mixtral", "olmo2"]
LATENT = ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "axk1", "glm4_moe_lite"]


@pytest.fixture(scope="module")
def words():
    """A tokenizer of the words w0, w1, ..., without a chat template."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 512)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def tiny(name, **overrides):
    """A model without an eos token, so that generation ends at its limit. In float64, except for experts, which do not take it."""
    experts = ("mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "axk1", "glm4_moe_lite")
    model = tiny_model(name, torch.float32 if name in experts else torch.float64, **overrides).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def generate(model, words, contexts=CONTEXTS, head=HEAD, **kwargs):
    prompts = [text(context + head) for context in contexts]
    return miso_generate(model, words, prompts, response_template=text(head), **{"do_sample": False} | kwargs)


def packed_logits(model, contexts, output, weighting="uniform", weights=None, where="successive"):
    """Logits (output tokens, vocabulary) of the forward of training, without a cache."""
    before = model.config._attn_implementation
    support = prepare_model(model, register_miso_attention(), None)
    tokens, example = parallel(contexts, len(output), weights or [1 / len(contexts)] * len(contexts), where)
    columns = [tokens + output]
    if not support.shares and where == "successive":
        example, columns = unshare(example, columns)
    row = {"input_ids": columns[0], "labels": columns[0], "miso_layout": encode(example)}
    batch = MISODataCollator(0, weighting, window=support.window)([row])
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0, -len(output) :]
    model.set_attn_implementation(before)
    return logits


def rows_logits(model, contexts, output, weighting="uniform", weights=None, where="successive"):
    """The same logits, by one-row-per-context execution."""
    before, lengths = model.config._attn_implementation, [len(context) for context in contexts]
    width = max(lengths) + len(output)
    ids, at = torch.zeros(2, len(contexts), width, dtype=torch.long)
    for i, positions in enumerate(positions_of(contexts, output, where)):
        ids[i, : len(positions)] = torch.tensor(contexts[i] + output)
        at[i, : len(positions)] = torch.tensor(positions)
    oracle = {"oracle_lengths": lengths, "oracle_output": len(output), "oracle_weighting": weighting}
    oracle["oracle_weights"] = weights or [1 / len(contexts)] * len(contexts)
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=at, use_cache=False, **oracle).logits
    model.set_attn_implementation(before)
    return logits[0, lengths[0] : lengths[0] + len(output)]


def assert_greedy(out, head, recompute, atol=1e-4):
    """Every token is the likeliest after the tokens before it, by the logits that `recompute` gives for the complete output."""
    ids, got = out.sequences[0].tolist(), torch.cat(out.logits).double()
    expected = recompute(head + ids)[len(head) - 1 : -1].double()
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    assert ids == expected.argmax(-1).tolist()


def random_case(rng):
    prefix = [rng.randrange(10, 500) for _ in range(rng.choice([0, 0, 4, 9]))]
    contexts = []
    for _ in range(rng.randint(1, 8)):
        suffix = [rng.randrange(10, 500) for _ in range(rng.randint(1, 7))]
        contexts.append(prefix[: rng.choice([len(prefix), rng.randint(0, len(prefix))])] + suffix)
    weighting = rng.choice(WEIGHTINGS)
    weights = [rng.uniform(0.1, 1) for _ in contexts] if weighting == "uniform" and rng.random() < 0.5 else None
    weights = weights and [w / sum(weights) for w in weights]
    head = rng.sample(range(2, 10), rng.randint(1, 3))
    return contexts, head, weighting, weights, rng.choice(["successive", "successive", "after_longest"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "cohere2"])
def test_greedy_equals_recomputation_and_rows(name, words):
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if name in ("gemma3", "cohere2") else {}
    model, rng = tiny(name, num_hidden_layers=2, **layers), random.Random(name)
    for _ in range(50):
        contexts, head, *settings = random_case(rng)
        weighting, weights, where = settings
        options = {"weighting": weighting, "weights": weights, "output_positions": where, "max_new_tokens": 5}
        out = generate(model, words, contexts, head, **options, return_dict_in_generate=True, output_logits=True)
        assert out.sequences.shape == (1, 5)
        assert_greedy(out, head, lambda output, c=contexts, s=settings: packed_logits(model, c, output, *s))
        assert_greedy(out, head, lambda output, c=contexts, s=settings: rows_logits(model, c, output, *s))


@pytest.mark.parametrize("name", ARCHITECTURES + LATENT)
def test_architectures(name, words):
    model = tiny(name)
    out = generate(model, words, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
    assert_greedy(out, HEAD, lambda output: rows_logits(model, CONTEXTS, output))


@pytest.mark.parametrize("weighting", ["uniform", "fid"])
@pytest.mark.parametrize("window", [1, 2, 5, 9, 13])  # the last window binds only after some tokens
def test_windows_that_bind(window, weighting, words):
    model = tiny("gemma3", sliding_window=window)
    options = {"max_new_tokens": 10, "weighting": weighting}
    out = generate(model, words, **options, return_dict_in_generate=True, output_logits=True)
    assert_greedy(out, HEAD, lambda output: rows_logits(model, CONTEXTS, output, weighting))


def test_kernels_generate_alike(words, monkeypatch):
    """Other kernels, as on a GPU or with a softcap, attend to the parts in one call of ragged sequences."""
    model, rng = tiny("llama", num_hidden_layers=2), random.Random(5)
    cases = [(random_case(rng), rng.choice([{}, {"num_beams": 2}])) for _ in range(30)]
    results = []
    for kernel in ("cpu", "reference"):
        monkeypatch.setattr(decoding, "resolve_kernel", lambda *args, kernel=kernel: KERNELS[kernel])
        results.append([])
        for (contexts, head, weighting, weights, where), beams in cases:
            options = {"weighting": weighting, "weights": weights, "output_positions": where, "max_new_tokens": 5}
            results[-1].append(generate(model, words, contexts, head, **options | beams).tolist())
    assert results[0] == results[1]


def test_half_precision(words):
    model = tiny("llama").to(torch.bfloat16)
    out = generate(model, words, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
    expected = packed_logits(model.double(), CONTEXTS, HEAD + out.sequences[0].tolist())[len(HEAD) - 1 : -1]
    torch.testing.assert_close(
        torch.cat(out.logits).double(), expected, rtol=0, atol=0.03 * expected.abs().max().item()
    )


def test_the_last_layer_does_not_attend_over_contexts(words, monkeypatch):
    """Outputs read the keys of the last layer's contexts, and nothing reads the attention of these contexts."""
    model, calls = tiny("llama", num_hidden_layers=3), []
    attend = KERNELS["cpu"].forward
    monkeypatch.setattr(Cpu, "forward", lambda self, q, *args: calls.append(len(q)) or attend(q, *args))
    shared = len(parallel(CONTEXTS, 1, [0.25] * 4, "successive")[0])
    generate(model, words, max_new_tokens=2)
    assert calls.count(shared) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 20, "temperature": 0.8}, {"num_beams": 3}, {"repetition_penalty": 1.5}],
    ids=["greedy", "sampling", "beams", "processors"],
)
def test_one_context_is_the_plain_model(name, options, words):
    sizes = {"sliding_window": 6} if name in ("gemma3", "cohere2", "gemma4") else {}
    model, prompt = tiny(name, **sizes), CONTEXTS[0] + HEAD
    for weighting in WEIGHTINGS if name == "llama" else ["fid"]:
        torch.manual_seed(1)
        got = generate(model, words, CONTEXTS[:1], weighting=weighting, max_new_tokens=8, **options)
        torch.manual_seed(1)
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=8, **{"do_sample": False} | options)
        assert got.tolist() == expected[:, len(prompt) :].tolist()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_sampling_is_from_the_recomputed_logits(weighting, llama, words):
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(30), TopPLogitsWarper(0.9)])
    drawn = []
    for seed in range(4):
        options = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "max_new_tokens": 6}
        torch.manual_seed(seed)
        drawn.append(generate(llama, words, weighting=weighting, **options)[0].tolist())
        torch.manual_seed(seed)
        output = list(HEAD)
        for _ in range(6):
            logits = packed_logits(llama, CONTEXTS, output, weighting)[-1:].float()
            scores = processors(torch.tensor([output]), logits)
            output.append(torch.multinomial(scores.softmax(-1), 1).item())
        assert drawn[-1] == output[len(HEAD) :]
    assert len(set(map(tuple, drawn))) == 4


def test_beams_score_as_one_row_per_context(llama, words):
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0, "max_new_tokens": 6}
    out = generate(llama, words, **options, return_dict_in_generate=True, output_scores=True)
    assert len(set(map(tuple, out.sequences.tolist()))) == 3
    for ids, score in zip(out.sequences.tolist(), out.sequences_scores, strict=True):
        logits = rows_logits(llama, CONTEXTS, HEAD + ids)[len(HEAD) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
        torch.testing.assert_close(score.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [512, 4])
def test_several_requests_are_each_alone(window, words):
    model = tiny("gemma3", sliding_window=window)
    requests = [CONTEXTS, [[30, 31, 32], [30, 40, 41, 42, 43, 44, 45, 46, 47]], [[50, 51, 52]]]
    prompts = [[text(context + HEAD) for context in contexts] for contexts in requests]
    weights = [[0.4, 0.3, 0.2, 0.1], [1.0, 3.0], [1.0]]
    options = {"response_template": text(HEAD), "max_new_tokens": 8, "do_sample": False}
    together = miso_generate(model, words, prompts, weights=weights, **options)
    alone = [miso_generate(model, words, p, weights=w, **options) for p, w in zip(prompts, weights, strict=True)]
    assert together.tolist() == torch.cat(alone).tolist()
    beams = {"num_beams": 2, "num_return_sequences": 2}
    together = miso_generate(model, words, prompts, **options, **beams)
    alone = [miso_generate(model, words, p, **options, **beams) for p in prompts]
    assert together.tolist() == torch.cat(alone).tolist()


def test_processors_see_no_tokens_of_others(llama, words):
    requests, seen = [CONTEXTS, [[30, 31]]], []
    prompts = [[text(context + HEAD) for context in contexts] for contexts in requests]
    look = LogitsProcessorList([lambda ids, scores: seen.append(ids) or scores])
    miso_generate(llama, words, prompts, response_template=text(HEAD), max_new_tokens=1, logits_processor=look)
    for ids, contexts in zip(seen[0].tolist(), requests, strict=True):
        assert set(ids) == {*sum(contexts, []), *HEAD}


def test_dropout_is_for_training(words):
    model = tiny("phi", resid_pdrop=0.5)
    expected = generate(model, words, max_new_tokens=6)
    assert generate(model.train(), words, max_new_tokens=6).tolist() == expected.tolist()


def test_messages_are_rendered_with_their_generation_prompt(tokenizer):
    model = tiny("llama")
    questions = ["the quiet boat", "the muddy bridge crosses", "the quiet heron"]
    conversations = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": s}] for s in questions]
    rendered = [f"<|system|>be brief<|user|>{s}<|assistant|>" for s in questions]
    options = {"max_new_tokens": 6, "do_sample": False}
    got = miso_generate(model, tokenizer, conversations, **options)
    assert got.tolist() == miso_generate(model, tokenizer, rendered, **options).tolist()
    ids = got[0].tolist()
    stop = next(i for i, id in enumerate(ids) if i and tokenizer.decode(ids[i]).isascii() and id not in ids[:i])
    stopped = miso_generate(model, tokenizer, conversations, **options, stop_strings=[tokenizer.decode(ids[stop])])
    assert stopped[0].tolist() == ids[: stop + 1]
    twice = miso_generate(model, tokenizer, [conversations, conversations[:2]], **options)
    assert twice[0].tolist() == got[0].tolist()
    assert twice[1].tolist() == miso_generate(model, tokenizer, conversations[:2], **options)[0].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_contexts_are_read_once_and_models_inspected_once(name, words):
    model, lengths = tiny(name), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    shared = len(parallel(CONTEXTS, 1, [0.25] * 4, "successive")[0])
    first = generate(model, words, max_new_tokens=4)
    probes, run = lengths[:-5], lengths[-5:]
    assert run == [shared, len(HEAD), 1, 1, 1] and probes and max(probes) <= 8
    lengths.clear()
    assert torch.equal(generate(model, words, max_new_tokens=4), first) and lengths == run


class Shifted(torch.nn.Module):
    """Each token sees the token before it, as in a convolution."""

    def forward(self, x):
        return x.roll(1, dims=1)


def test_a_changed_model_is_inspected_again(words):
    model = tiny("llama")
    generate(model, words, max_new_tokens=2)
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout=0.1"):
        generate(model, words, max_new_tokens=2)
    model.config.attention_dropout = 0.0
    generate(model, words, max_new_tokens=2)
    model.model.layers[1].mlp = Shifted()
    with pytest.raises(ValueError, match="outside of attention"):
        generate(model, words, max_new_tokens=2)


class Recorder(BaseStreamer):
    def __init__(self, fails=False):
        self.chunks, self.ended, self.fails = [], False, fails

    def put(self, value):
        self.chunks.append(value.flatten().tolist())
        if self.fails and len(self.chunks) == 3:
            raise RuntimeError("the listener left")

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    def __init__(self, word):
        self.word = word

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.word


def test_streamer_and_stopping(llama, words):
    tokens = generate(llama, words, max_new_tokens=8)[0].tolist()
    assert len(set(tokens)) > 3
    streamer = Recorder()
    generate(llama, words, max_new_tokens=8, streamer=streamer)
    assert sum(streamer.chunks[1:], []) == tokens and streamer.chunks[0][-len(HEAD) :] == HEAD and streamer.ended
    word = next(w for w in tokens[1:] if w != tokens[0])
    until = tokens[: tokens.index(word) + 1]
    assert generate(llama, words, max_new_tokens=8, stopping_criteria=[After(word)])[0].tolist() == until
    assert generate(llama, words, max_new_tokens=8, eos_token_id=word)[0].tolist() == until


def state_of(model):
    modules = [(m.training, getattr(m, "miso_rotation", None), len(m._forward_pre_hooks)) for m in model.modules()]
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    configs = [model.config._attn_implementation, model.config.to_dict(), model.generation_config.to_dict()]
    return deepcopy((modules, configs)), logits.tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "miso_torch_auto"])
@pytest.mark.parametrize("case", ["done", "listener", "refused", "request"])
def test_the_model_is_restored(case, implementation, words):
    model = tiny("stablelm" if case == "refused" else "llama").train()
    register_miso_attention()
    model.set_attn_implementation(implementation)
    model.model.layers[1].eval()
    before = state_of(model)
    if case == "done":
        generate(model, words, max_new_tokens=3)
    else:
        options = {"streamer": Recorder(fails=True)} if case == "listener" else {}
        options |= {"no_such_option": 1} if case == "request" else {}
        with pytest.raises((ValueError, RuntimeError), match="listener|keyword arguments|no_such_option"):
            generate(model, words, max_new_tokens=8, **options)
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["arguments", "config", "model"])
@pytest.mark.parametrize(
    "option", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"cache_implementation": "static"}]
)
def test_options_that_take_tokens_back_are_refused(option, where, words):
    model, (name, value) = tiny("llama"), *option.items()
    given = option
    if where == "config":
        given = {"generation_config": GenerationConfig(**option)}
    elif where == "model":
        given = {}
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"Got {name} for generate.*Fix: "):
        generate(model, words, max_new_tokens=3, **given)


def test_messages_need_a_chat_template(llama, words):
    with pytest.raises(ValueError, match="without a chat template.*tokenizer.chat_template"):
        miso_generate(llama, words, [[{"role": "user", "content": "w5"}]], max_new_tokens=3)


def test_an_assistant_is_refused(llama, words):
    with pytest.raises(ValueError, match="Got assistant_model for generate"):
        generate(llama, words, max_new_tokens=3, assistant_model=llama)


def test_modules_that_attend_twice_are_refused(words):
    with pytest.raises(ValueError, match="attends more than once.*Fix: "):
        generate(tiny("diffllama"), words, max_new_tokens=3)


def test_contexts_that_generate_does_not_hand_on_are_an_error(llama, words, monkeypatch):
    """As transformers 5.24 did, which named the cache's argument anew: never an output without contexts."""
    monkeypatch.setattr("trl_miso.generation.generate._with_cache", lambda module, args, kwargs: (args, kwargs))
    with pytest.raises(RuntimeError, match="0 of 3 attention layers read the contexts.*Fix: install a version"):
        generate(llama, words, max_new_tokens=3)


def test_contexts_that_a_layer_does_not_read_are_an_error(llama, words, monkeypatch):
    forward = decoding._attention_forward

    def forgetful(module, *args, miso_cache=None, **kwargs):
        reads_contexts = "miso_cu_seqlens_q" in kwargs
        return forward(module, *args, miso_cache=miso_cache if reads_contexts or module.layer_idx else None, **kwargs)

    monkeypatch.setattr(decoding, "_attention_forward", forgetful)
    with pytest.raises(RuntimeError, match="2 of 3 attention layers read the contexts"):
        generate(llama, words, max_new_tokens=3)


@pytest.mark.parametrize("name", ["stablelm", "bloom", "gpt_oss", "qwen3_next"])
def test_models_that_training_refuses(name, words):
    model = tiny(name)
    with pytest.raises(ValueError) as refused:
        generate(model, words, max_new_tokens=3)
    with pytest.raises(ValueError) as training:
        prepare_model(tiny(name), register_miso_attention(), None)
    assert str(refused.value) == str(training.value)


GEMMA = {"sliding_window": 8}


@pytest.mark.parametrize(
    ("model", "contexts", "options", "message"),
    [
        ({}, CONTEXTS, {"weighting": "mean"}, "Got weighting='mean'"),
        ({}, CONTEXTS, {"output_positions": "first"}, "Got output_positions='first'"),
        ({}, CONTEXTS, {"weighting": "fid", "weights": [1.0] * 4}, "no effect"),
        ({}, CONTEXTS, {"weights": [1.0] * 3}, "4 positive numbers"),
        ({}, CONTEXTS, {"input_ids": 1, "use_cache": False}, r"\['input_ids', 'use_cache'\]"),
        ({}, [[5], []], {}, "empty context"),
        ({}, [], {}, "at least one context"),
        (GEMMA, CONTEXTS, {"weighting": "vanilla"}, "window of 8"),
        (GEMMA, CONTEXTS, {"output_positions": "after_longest"}, "window of 8"),
    ],
)
def test_refused_requests(model, contexts, options, message, words):
    with pytest.raises(ValueError, match=message) as error:
        generate(tiny("gemma3", **model), words, contexts, **{"max_new_tokens": 4} | options)
    assert all(part in str(error.value) for part in ("Got", "xpected", "Fix: "))


CHAT = [{"role": "user", "content": "w5"}]


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (torch.ones(1, 3), "Got Tensor as contexts"),
        ("w5 w6", "Got str as contexts"),
        ([torch.ones(3)], "Got tensor.* as a context"),
        (["w5", 3], "Got 3 as a context"),
        ([CHAT, "w5"], "Got strings and lists of messages as contexts"),
        ([["w5"], [CHAT]], "Got strings and lists of messages as contexts"),
        ([[CHAT], "w5"], "Got 'w5' as the contexts of a request"),
    ],
)
def test_contexts_of_other_types_are_refused(contexts, message, llama, words):
    with pytest.raises(ValueError, match=message + ".*expected a list of contexts.*Fix: "):
        miso_generate(llama, words, contexts, max_new_tokens=2)


def test_what_is_not_loaded_is_refused(llama, words):
    with pytest.raises(ValueError, match="Got 'model' as model.*Fix: give AutoModelForCausalLM.from_pretrained"):
        miso_generate("model", words, ["w5"])
    for tokenizer in (None, "model"):
        with pytest.raises(ValueError, match=f"Got {type(tokenizer).__name__} as tokenizer.*Fix: "):
            miso_generate(llama, tokenizer, ["w5"])


def test_contexts_that_end_differently(llama, words):
    for contexts in (["w5 w6", "w5 w7"], [["w5 w6", "w5 w7"]]):
        with pytest.raises(ValueError, match="end differently"):
            miso_generate(llama, words, contexts, max_new_tokens=2)


def test_positions_that_are_learned_need_after_longest(words):
    model = tiny("gpt2", attn_pdrop=0.0)
    with pytest.raises(ValueError, match="after_longest"):
        generate(model, words, max_new_tokens=4)
    options = {"max_new_tokens": 4, "output_positions": "after_longest"}
    out = generate(model, words, **options, return_dict_in_generate=True, output_logits=True)
    assert_greedy(out, HEAD, lambda output: rows_logits(model, CONTEXTS, output, where="after_longest"))


def test_contexts_of_a_rotation_that_depends_on_the_length(words):
    """Without `max_new_tokens` a row may exceed the length up to which the rotation is constant, so contexts share nothing."""
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    out = generate(model, words, max_length=40, return_dict_in_generate=True, output_logits=True)
    assert sum(map(len, CONTEXTS)) in lengths
    assert_greedy(out, HEAD, lambda output: rows_logits(model, CONTEXTS, output))
    lengths.clear()
    generate(model, words, max_new_tokens=4)
    assert sum(map(len, CONTEXTS)) not in lengths


def test_example(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate_multi_context.py", "--max_new_tokens", "4"])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "generate_multi_context.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"\n{weighting}: " in printed for weighting in WEIGHTINGS)
    one_prompt, contexts = printed.split("\nContexts:")
    assert "\nstandard inference: '" in one_prompt and "1. paralysis" in one_prompt and "4. paralysis" in one_prompt
    assert "standard" not in contexts
