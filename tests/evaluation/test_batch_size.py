"""How many prompts a local model answers at once: the rule, batches that are halved, and runs that resume with the size of the killed run."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.support.models import tiny_model
from trl_miso.evaluation import backends, batch_size
from trl_miso.evaluation.inference import ModelRequest, respond
from trl_miso.sources.synthetic import build_model

WORDS = ["the", "quiet", "garden", "and", "the", "market", "by", "the", "river", "at", "dawn", "in", "spring"]
# Of different lengths, not in the order of the lengths; the first again at the end.
PROMPTS = [" ".join(WORDS[:count]) for count in (3, 9, 1, 12, 6, 2, 11, 4, 8, 3)]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that are asked; memory runs out with more than two prompts beside one of at most `short` tokens."""
    log = SimpleNamespace(sizes=[], short=0)
    answer = backends.greedy_responses

    def limited(loaded, tokenizer, prompts_ids, max_new_tokens):
        log.sizes.append(len(prompts_ids))
        if len(prompts_ids) > 2 and min(map(len, prompts_ids)) <= log.short:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return answer(loaded, tokenizer, prompts_ids, max_new_tokens)

    monkeypatch.setattr(backends, "greedy_responses", limited)
    return log


def asked_with(monkeypatch, size):
    """Choose a default batch size; None: none may be chosen."""
    choose = (lambda *_: pytest.fail("a batch size was chosen anew")) if size is None else (lambda *_: size)
    monkeypatch.setattr(backends, "default_batch_size", choose)


def ask(file, model, size=None):
    respond(PROMPTS, file, ModelRequest(model, max_new_tokens=5, batch_size=size))
    return [json.loads(line) for line in file.read_text().splitlines()]


# The rule


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_batch_size_is_the_largest_power_of_two_in_half_of_the_free_memory(device, monkeypatch):
    model, cap = SimpleNamespace(device=torch.device(device)), {"cpu": 32, "cuda": 128}[device]
    monkeypatch.setattr(batch_size, "prompt_bytes", lambda *_: 1000)
    cases = ((0, 1), (1999, 1), (3999, 1), (4000, 2), (7999, 2), (8000, 4), (63_999, 16), (64_000, 32))
    for free, expected in (*cases, (200_000, min(64, cap)), (10**12, cap)):
        monkeypatch.setattr(batch_size, "free_memory", lambda _, free=free: free)
        assert batch_size.default_batch_size(model, 10, 10) == expected


def test_the_memory_of_a_prompt_is_that_of_the_cache_the_activations_and_the_logits(tokenizer):
    """4 layers, keys and values of 2 heads of width 32, and a model of width 128, in float32."""
    model = build_model(tokenizer)
    for longest, limit in ((1, 1), (40, 8)):
        expected = 4 * 2 * 2 * 32 * 4 * (longest + limit) + 32 * 128 * 4 * longest + 12 * len(tokenizer)
        assert batch_size.prompt_bytes(model, longest, limit) == expected


@pytest.mark.parametrize("name", ["gemma3", "lfm2", "qwen3_next", "deepseek_v3"])
def test_the_cache_of_other_architectures_is_counted(name):
    """Sliding windows (as if there were none), keys that are wider than values, and states of a fixed size, which grow with no token."""
    model, tokens = tiny_model(name), 32
    with torch.inference_mode():
        cache = model(input_ids=torch.ones((1, tokens), dtype=torch.long), use_cache=True).past_key_values
    keys_and_values = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            keys_and_values += layer.keys.nbytes + layer.values.nbytes
    estimates = [batch_size.prompt_bytes(model, 24, limit) for limit in (8, 8 + tokens)]
    vocabulary, width = model.get_input_embeddings().weight.shape
    assert estimates[1] - estimates[0] == keys_and_values
    assert estimates[0] >= keys_and_values + 32 * width * 4 * 24 + 12 * vocabulary


def test_where_memory_is_not_known_the_batch_size_is_8_and_a_warning_says_so(tokenizer, monkeypatch, caplog):
    model = build_model(tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(batch_size, "free_memory", lambda _: None)
        assert batch_size.default_batch_size(model, 10, 10) == 8
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: SimpleNamespace(logits=None))
    assert batch_size.default_batch_size(model, 10, 10) == 8
    assert "The free memory is not known: 8 prompts per batch. Fix: give --batch_size." in caplog.text
    assert "The cache is not known" in caplog.text


def test_free_memory_includes_what_torch_has_reserved_and_not_allocated(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (1000, 5000))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: 200)
    assert batch_size.free_memory(device) == 1100

    def unknown(_):
        raise RuntimeError("this allocator does not tell")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", unknown)
    assert batch_size.free_memory(device) is None
    assert batch_size.free_memory(torch.device("cpu")) > 0


# Runs


def test_sorted_batches_give_the_responses_of_single_prompts_in_the_order_of_the_prompts(model, tmp_path, batches):
    """In float32, where the rounding that the shape of a batch decides does not turn a token of this model."""
    rows = ask(tmp_path / "default.jsonl", model)
    assert batches.sizes == [len(PROMPTS)]
    single = ask(tmp_path / "single.jsonl", model, size=1)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["response"] for row in rows] == [row["response"] for row in single]
    assert {row["batch_size"] for row in rows} == {32} and {row["batch_size"] for row in single} == {1}


@pytest.mark.parametrize("size", [4, 5])  # halved to 2: batches begin where one of 4 has begun, or within one of 5
def test_a_batch_that_is_too_large_is_halved_and_the_run_killed_at_any_row_resumes(
    size, model, tokenizer, tmp_path, monkeypatch, batches, caplog
):
    """No response is lost or doubled, and the file is the same, whatever the free memory is when the run resumes."""
    ids = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in PROMPTS], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    order = sorted(range(len(PROMPTS)), key=lambda number: len(ids[number]), reverse=True)
    short = batches.short = len(ids[order[size + 1]])  # the second batch is the first with a prompt as short as this
    asked_with(monkeypatch, size)
    file = tmp_path / "r.jsonl"
    rows = ask(file, model)
    assert batches.sizes[0] == size == rows[order[0]]["batch_size"]
    assert set(batches.sizes[2:]) == {2} == {rows[number]["batch_size"] for number in order[size:]}
    assert f"Memory ran out with {batches.sizes[1]} prompts in a batch. Continuing with 2." in caplog.text
    whole = file.read_bytes()
    batches.short = 0
    single = ask(tmp_path / "single.jsonl", model, size=1)
    assert [row["response"] for row in rows] == [row["response"] for row in single]
    batches.short = short
    lines = whole.splitlines(keepends=True)
    answered = [lines[number] for number in order]  # as the rows are written, before the file is sorted
    for count in range(len(answered) + 1):
        asked_with(monkeypatch, size if count == 0 else None)
        unfinished = answered[count][:-9] if count < len(answered) else b""
        file.write_bytes(b"".join(answered[:count]) + unfinished)
        ask(file, model)
        assert file.read_bytes() == whole


def test_a_given_batch_size_is_used_by_a_run_that_resumes(model, tmp_path, batches):
    file = tmp_path / "r.jsonl"
    ask(file, model, size=5)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    batches.sizes.clear()
    assert ask(file, model, size=2)[-1]["batch_size"] == 2 and batches.sizes == [2]


def test_too_little_memory_for_one_prompt_is_an_error_with_a_fix(model, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(backends, "greedy_responses", fail)
    with pytest.raises(
        ValueError, match=r"too little memory on cpu for one prompt of \d+ tokens.*Fix: lower max_new_tokens"
    ):
        ask(tmp_path / "r.jsonl", model)


def test_other_errors_are_not_taken_for_too_little_memory(model, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("an index is out of range")

    monkeypatch.setattr(backends, "greedy_responses", fail)
    with pytest.raises(RuntimeError, match="an index is out of range"):
        ask(tmp_path / "r.jsonl", model)
