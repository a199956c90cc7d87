"""Standard inference: every backend gives the responses of plain greedy decoding, and an interrupted run resumes.

vLLM needs a GPU. `FakeVLLM` has the signatures of vLLM's `LLM` and `SamplingParams` (its commit 10fdb8f, before 0.16), and does what they
are documented to do, by transformers. Nothing here was run on vLLM.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.chat_server import Fault, chat_server
from trl_miso.cli.eval import main
from trl_miso.cli.eval_arguments import add_model_arguments, model_request, responses_file
from trl_miso.evaluation import backends, model_fingerprint
from trl_miso.evaluation.file_lock import exclusive_lock
from trl_miso.evaluation.inference import respond
from trl_miso.evaluation.responses import Questions, load_responses
from trl_miso.sources.synthetic import build_model

QUESTIONS = [
    "Write about the river.",
    "Hello",
    "Tell me, at length, about the quiet garden and the market.",
    "Why?",
    "é\n…",
]


@pytest.fixture(scope="module")
def penalized(model, tmp_path_factory):
    """The same model, with a repetition penalty in its generation config."""
    folder = tmp_path_factory.mktemp("penalized")
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    GenerationConfig.from_pretrained(model, repetition_penalty=1.5).save_pretrained(folder)
    return str(folder)


def with_config(model, folder, name, **changed):
    """Copy the model, and change values of one of its configs."""
    shutil.copytree(model, folder)
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))
    return folder


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai", reason="needs pip install 'trl-miso[eval]'")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server() as server:
        yield server


def request(**options):
    """Parse the options as the commands do."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return model_request(parser.parse_args([f"--{name}={value}" for name, value in options.items()]))


def ask(file, prompts=QUESTIONS, **options):
    respond(prompts, file, request(**options))
    return load_responses(file, Questions(prompts, range(len(prompts))))


# transformers


def test_responses_are_those_of_plain_greedy_decoding(model, tokenizer, tmp_path):
    """One prompt at a time, token by token from the logits, without padding, cache or `generate`."""
    responses = ask(tmp_path / "r.jsonl", model=model, batch_size=3, max_new_tokens=8)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(row["row"], row["prompt"]) for row in rows] == list(enumerate(QUESTIONS, start=1))
    plain = build_model(tokenizer)
    for prompt, response in zip(QUESTIONS, responses, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tokens = []
        while len(tokens) < 8 and tokenizer.eos_token_id not in tokens:
            with torch.no_grad():
                tokens.append(plain(torch.tensor([ids + tokens])).logits[0, -1].argmax().item())
        assert response == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_killed_run_resumes(model, tmp_path):
    """Truncated anywhere, also within a row, the file is completed to that of an uninterrupted run."""
    file = tmp_path / "r.jsonl"
    settings = {"model": model, "batch_size": 2, "max_new_tokens": 4}
    ask(file, **settings)
    whole = file.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 5, ends[0], ends[1] - 1, ends[2] + 40, ends[4] - 3):
        file.write_bytes(whole[:cut])
        ask(file, **settings)
        assert file.read_bytes() == whole


def test_rows_are_on_disk_before_the_next_batch_and_not_asked_again(model, tokenizer, tmp_path, monkeypatch):
    file, asked = tmp_path / "r.jsonl", []
    longest_first = sorted(QUESTIONS, key=lambda question: len(tokenizer(question)["input_ids"]), reverse=True)

    def questions_of(prompts_ids):
        texts = tokenizer.batch_decode(prompts_ids)
        return [next(question for question in QUESTIONS if question in text) for text in texts]

    def generate(_model, _tokenizer, prompts_ids, _max):
        assert file.read_bytes().count(b"\n") == len(asked)
        if len(asked) == 4:
            raise KeyboardInterrupt
        questions = questions_of(prompts_ids)
        asked.extend(questions)
        return tokenizer([f"answer to {question}" for question in questions])["input_ids"]

    monkeypatch.setattr(backends, "greedy_responses", generate)
    with pytest.raises(KeyboardInterrupt):
        ask(file, model=model, batch_size=2, max_new_tokens=4)
    batches = []

    def generate_late(_model, _tokenizer, prompts_ids, _max):
        batches.append(questions_of(prompts_ids))
        return tokenizer(["late"] * len(prompts_ids))["input_ids"]

    monkeypatch.setattr(backends, "greedy_responses", generate_late)
    responses = ask(file, model=model, batch_size=3, max_new_tokens=4)
    # The batch of an uninterrupted run: its first row is already in the file and stays.
    assert batches == [longest_first[3:]]
    late = longest_first[4]
    assert responses == ["late" if text == late else f"answer to {text}" for text in QUESTIONS]
    monkeypatch.setattr(backends, "_load", lambda _: pytest.fail("a model was loaded for nothing"))
    ask(file, model=model, batch_size=3, max_new_tokens=4)


def test_a_file_of_another_run_is_refused_and_kept(model, tmp_path):
    file = tmp_path / "r.jsonl"
    ask(file, QUESTIONS[:2], model=model, max_new_tokens=2)
    own = file.read_bytes()
    first = own.split(b"\n")[0]
    for text, prompts, changed in (
        (own, QUESTIONS[::-1], {}),
        (own, QUESTIONS, {"max_new_tokens": 3}),
        (own, QUESTIONS, {"model": "another"}),
        (own, QUESTIONS, {"backend": "openai", "base_url": "http://127.0.0.1:9"}),
        (own, QUESTIONS[:1], {}),
        (first + b"\n" + first + b"\n", QUESTIONS, {}),
        (b'{"response": "mine"}\n', QUESTIONS, {}),
        (b"not ours", QUESTIONS, {}),
    ):
        file.write_bytes(text)
        with pytest.raises(
            ValueError, match=r"Got line [12] of .* is not a response of this model, backend and max_new_tokens.*Fix: "
        ):
            ask(file, prompts, **({"model": model, "max_new_tokens": 2} | changed))
        assert file.read_bytes() == text


def test_a_model_without_a_chat_template_is_refused(model, tokenizer, tmp_path):
    bare = tokenizer.__class__.from_pretrained(model)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no chat template.*Fix: "):
        ask(tmp_path / "r.jsonl", model=tmp_path / "bare")


def test_more_tokens_than_the_model_has_positions_are_refused_before_the_first_batch(model, tmp_path, monkeypatch):
    """The longest prompt counts, even if its response is not missing."""
    folder = with_config(model, tmp_path / "short", "config.json", max_position_embeddings=64)
    monkeypatch.setattr(backends, "greedy_responses", lambda *_: pytest.fail("asked"))
    with pytest.raises(
        ValueError, match="Got max_new_tokens=50 with a prompt of (..) tokens, expected at most 64 together.*Fix: "
    ):
        ask(tmp_path / "r.jsonl", model=folder, max_new_tokens=50)
    with pytest.raises(ValueError, match=r"with a prompt of \d+ tokens.*positions. Fix: leave long prompts out"):
        ask(tmp_path / "r.jsonl", ["a river " * 64], model=folder, max_new_tokens=1)
    assert not (tmp_path / "r.jsonl").exists()


def test_stop_strings_end_a_response(penalized, tmp_path):
    responses = ask(tmp_path / "r.jsonl", model=penalized, max_new_tokens=32)
    whole = next(text for text in responses if re.search(r"(?s)[A-Za-z].{3}", text))
    text = re.search(r"(?s)[A-Za-z](?=.{3})", whole).group()
    stopped = with_config(penalized, tmp_path / "stopped", "generation_config.json", stop_strings=[text])
    cut = ask(tmp_path / "s.jsonl", model=stopped, max_new_tokens=32)[responses.index(whole)]
    assert text in cut and whole.startswith(cut) and cut != whole


def test_adapters_without_peft_are_refused(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(backends, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"holds adapters, without peft.*Fix: pip install 'trl-miso\[peft\]'"):
        ask(tmp_path / "r.jsonl", model=tmp_path)


# Options


def test_the_default_file_is_named_after_benchmark_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ({"model": "hub/Some-8B"}, "ifeval-Some-8B.jsonl"),
        ({"model": "out/checkpoint-5/"}, "ifeval-checkpoint-5.jsonl"),
        ({"model": "."}, f"ifeval-{tmp_path.name}.jsonl"),
    ):
        assert responses_file(argparse.Namespace(responses=None, **given), "ifeval") == expected
        assert responses_file(argparse.Namespace(responses="r.jsonl", **given), "ifeval") == "r.jsonl"
    for command in (["ifeval"], ["ifeval_flatten", "--bases", "b"], ["complexbench", "--data", "d", "--judge", "j"]):
        verdicts = ["--verdicts", "v"] if command[0] == "complexbench" else []
        with pytest.raises(ValueError, match="Got neither --responses nor --model.*Fix: "):
            main([*command, *verdicts])


def test_without_a_model_nothing_is_asked(tmp_path):
    assert request() is None
    respond(QUESTIONS, tmp_path / "r.jsonl", request())
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "transformers"}, "--backend without --model"),
        ({"concurrency": 2}, "--concurrency without --model"),
        ({"model": "m", "base_url": "http://a"}, "--base_url with --backend transformers.*--backend openai"),
        ({"model": "m", "backend": "vllm", "concurrency": 2}, "--concurrency with --backend vllm.*--backend openai"),
        (
            {"model": "m", "backend": "openai", "batch_size": 2},
            "--batch_size with --backend openai.*transformers or vllm",
        ),
    ],
)
def test_options_without_effect_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=f"Got {message}"):
        ask(tmp_path / "r.jsonl", **given)
    assert not (tmp_path / "r.jsonl").exists()


# vLLM


@dataclass
class SamplingParams:
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    max_tokens: int | None = 16
    skip_special_tokens: bool = True


class FakeVLLM(ModuleType):
    """The module. `calls` has the number of conversations per call of `chat`."""

    def __init__(self):
        super().__init__("vllm")
        self.calls = calls = []
        self.SamplingParams = SamplingParams

        class LLM:
            def __init__(self, model: str, *, runner="auto", tensor_parallel_size=1, dtype="auto", seed=0, **kwargs):
                self.tokenizer = AutoTokenizer.from_pretrained(model)
                self.model = AutoModelForCausalLM.from_pretrained(model)
                self.defaults = GenerationConfig.from_pretrained(model)

            def get_default_sampling_params(self):
                return SamplingParams(repetition_penalty=self.defaults.repetition_penalty or 1.0, temperature=0.7)

            def chat(
                self,
                messages,
                sampling_params=None,
                use_tqdm=True,
                lora_request=None,
                chat_template=None,
                chat_template_content_format="auto",
                add_generation_prompt=True,
                continue_final_message=False,
                tools=None,
                chat_template_kwargs=None,
                tokenization_kwargs=None,
                mm_processor_kwargs=None,
            ):
                calls.append(len(messages))
                assert sampling_params.temperature == 0
                return [
                    SimpleNamespace(outputs=[SimpleNamespace(text=self._one(conversation, sampling_params))])
                    for conversation in messages
                ]

            def _one(self, conversation, params):
                ids = self.tokenizer.apply_chat_template(
                    [conversation], add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
                settings = GenerationConfig(
                    do_sample=False,
                    max_new_tokens=params.max_tokens,
                    repetition_penalty=params.repetition_penalty,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.eos_token_id,
                )
                self.model.generation_config = GenerationConfig()
                tokens = self.model.generate(**ids, generation_config=settings)[0, ids["input_ids"].shape[1] :]
                return self.tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)

        self.LLM = LLM


def test_vllm_gives_the_responses_of_transformers(model, penalized, tmp_path, monkeypatch):
    """Also with a repetition penalty; in batches, so that the rows of a killed run are kept."""
    monkeypatch.setitem(sys.modules, "vllm", fake := FakeVLLM())
    responses = {}
    for folder in (model, penalized):
        for backend in ("transformers", "vllm"):
            file = tmp_path / f"{Path(folder).name}-{backend}.jsonl"
            responses[folder, backend] = ask(file, model=folder, backend=backend, batch_size=2, max_new_tokens=8)
        assert responses[folder, "vllm"] == responses[folder, "transformers"]
    assert responses[model, "transformers"] != responses[penalized, "transformers"]
    assert fake.calls == [2, 2, 1] * 2
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"\n") + 9])
    ask(file, model=penalized, backend="vllm", batch_size=2, max_new_tokens=8)
    assert file.read_bytes() == whole


def test_missing_vllm_is_named_with_its_fix(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="Got no vLLM.*Fix: install it.*--backend openai"):
        ask(tmp_path / "r.jsonl", model="m", backend="vllm")


# OpenAI-compatible servers


def test_a_server_is_asked_one_user_turn_per_prompt(server, tmp_path):
    """Answers come in another order than the prompts, the file has the prompts' order; a repeated prompt has two rows."""
    prompts = [*QUESTIONS, QUESTIONS[0]]
    server.faults[QUESTIONS[0]] = [Fault(delay=0.2)]
    settings = {"model": "m", "backend": "openai", "base_url": server.url, "max_new_tokens": 9, "concurrency": 3}
    assert ask(tmp_path / "r.jsonl", prompts, **settings) == [f"answer to {text}" for text in prompts]
    assert [request.body for request in sorted(server.requests, key=lambda request: prompts.index(request.text))][
        1:3
    ] == [
        {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 9}
        for text in (QUESTIONS[0], QUESTIONS[1])
    ]
    assert len(server.requests) == 6 and 2 <= server.most_at_once <= 3
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "127.0.0.1" not in (tmp_path / "r.jsonl").read_text()


def test_after_an_error_answers_are_kept_and_the_next_run_resumes(server, tmp_path):
    file = tmp_path / "r.jsonl"
    settings = {"model": "m", "backend": "openai", "base_url": server.url, "concurrency": 2}
    whole = ask(tmp_path / "whole.jsonl", **settings) and (tmp_path / "whole.jsonl").read_bytes()
    server.requests.clear()
    server.faults = {
        QUESTIONS[0]: [Fault(delay=0.2)],
        QUESTIONS[2]: [Fault(401, {"error": {"message": "no such key"}})],
    }
    with pytest.raises(ValueError, match="no such key.*This was prompt 3. The responses that came are kept"):
        ask(file, **settings)
    came = [json.loads(line)["row"] for line in file.read_text().splitlines()]
    assert came[0] == 2 and sorted(came) == [1, 2]  # in the order in which they came
    with pytest.raises(ValueError, match="Got 2 responses"):
        load_responses(file, Questions(QUESTIONS, range(len(QUESTIONS))))
    assert ask(file, **settings) == [f"answer to {text}" for text in QUESTIONS]
    assert sorted(request.text for request in server.requests) == sorted([*QUESTIONS, QUESTIONS[2]])
    assert file.read_bytes() == whole


def test_refused_prompts_stop_no_others_and_can_be_scored_as_empty(server, tmp_path):
    """By the command in the message, in a folder whose name a shell would split."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    file, settings = folder / "r.jsonl", {"model": "m", "backend": "openai", "base_url": server.url, "concurrency": 2}
    words = Fault(400, {"error": {"message": "inappropriate content"}})
    server.faults = {QUESTIONS[1]: [words] * 2, QUESTIONS[3]: [words] * 2}
    for _ in range(2):
        with pytest.raises(
            ValueError, match="inappropriate .*This was prompt 2 and 1 others. .*scored as empty"
        ) as error:
            ask(file, **settings)
        assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [1, 3, 5]
    assert len(server.requests) == 5 + 2
    command = re.search("(cat .*), then the same command", str(error.value)).group(1)
    subprocess.run(command, shell=True, check=True)
    assert ask(file, **settings) == [f"answer to {text}" * (at not in (1, 3)) for at, text in enumerate(QUESTIONS)]
    assert len(server.requests) == 5 + 2 and list(folder.iterdir()) == [file]
    ask(folder / "whole.jsonl", **settings)
    kept, whole = file.read_bytes().splitlines(), (folder / "whole.jsonl").read_bytes().splitlines()
    assert [kept[at] for at in (0, 2, 4)] == [whole[at] for at in (0, 2, 4)]


def test_rows_in_any_order_are_sorted_by_the_next_run(server, tmp_path):
    """As left by a run that was killed before it sorted the rows, or within a row."""
    file = tmp_path / "r.jsonl"
    settings = {"model": "m", "backend": "openai", "base_url": server.url}
    ask(file, **settings)
    whole = file.read_bytes()
    rows = whole.splitlines(keepends=True)
    for left in (rows[::-1], [rows[3], rows[1], rows[2][:-9]]):
        file.write_bytes(b"".join(left))
        ask(file, **settings)
        assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [file]


# Fingerprints of models


def test_responses_of_the_model_before_retraining_are_refused(model, tmp_path, capsys):
    folder, file = tmp_path / "model", tmp_path / "r.jsonl"
    shutil.copytree(model, folder)
    ask(file, QUESTIONS[:2], model=folder, max_new_tokens=2)
    own = file.read_bytes()
    capsys.readouterr()
    for name in ("scores.json", "trainer_state.json", "optimizer.pt"):  # files without effect on responses
        (folder / name).write_text("{}")
    ask(file, QUESTIONS[:2], model=folder, max_new_tokens=2)
    assert capsys.readouterr().err == f"2 of 2 responses kept in {file}, none asked.\n"
    for name in ("model.safetensors", "chat_template.jinja", "generation_config.json"):
        changed = folder / name
        stat, data = changed.stat(), changed.read_bytes()
        changed.write_bytes(data)
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        with pytest.raises(
            ValueError, match=r"line 1 of .*, source 'folder \w+' where this run has 'folder \w+' \(the model"
        ):
            ask(file, QUESTIONS[:2], model=folder, max_new_tokens=2)
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    ask(file, QUESTIONS[:2], model=folder, max_new_tokens=2)
    assert file.read_bytes() == own


def test_responses_of_another_server_are_refused(server, tmp_path, monkeypatch):
    file, settings = tmp_path / "r.jsonl", {"model": "default", "backend": "openai"}
    ask(file, **settings, base_url=server.url)
    asked = len(server.requests)
    ask(file, **settings, base_url=server.url.replace("//", "//me:word@") + "/?token=x")
    with (
        chat_server() as other,
        pytest.raises(ValueError, match=r"source 'server \w+' where this run has 'server \w+'"),
    ):
        ask(file, **settings, base_url=other.url)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    ask(file, **settings)
    assert len(server.requests) == asked and not other.requests


def test_commits_on_the_hub_have_different_fingerprints(tmp_path, monkeypatch):
    """Of models in the cache: the Hub is not asked."""
    commits = iter(("a" * 40, "a" * 40, "b" * 40))
    monkeypatch.setattr(
        model_fingerprint, "cached_file", lambda *_, **__: f"hub/models--a--b/snapshots/{next(commits)}/config.json"
    )
    first, again, later = (model_fingerprint.model_fingerprint("a/b", "transformers", None) for _ in range(3))
    assert first == again == "commit " + "a" * 40 != later
    monkeypatch.undo()
    assert model_fingerprint.model_fingerprint("nobody/nothing", "transformers", None) is None


def test_a_missing_folder_leaves_no_file_behind(tmp_path):
    for folder in ("./wrong", str(tmp_path / "wrong"), "out/run/checkpoint-5"):
        with pytest.raises(ValueError, match=f"Got '{folder}', which does not exist.*Fix: "):
            ask(tmp_path / "r.jsonl", model=folder)
        with pytest.raises(ValueError, match=f"Got no folder {folder}, expected .*Fix: "):
            model_fingerprint.model_fingerprint(folder, "transformers", None)
    with pytest.raises(OSError):
        ask(tmp_path / "r.jsonl", model="nobody/nothing")
    assert not list(tmp_path.iterdir())


def test_a_second_run_on_the_same_file_is_refused(server, tmp_path):
    file, settings = tmp_path / "r.jsonl", {"model": "m", "backend": "openai", "base_url": server.url}
    with exclusive_lock(file), pytest.raises(ValueError, match="r.jsonl, which another run is writing.*Fix: wait"):
        ask(file, **settings)
    ask(file, **settings)
    assert len(server.requests) == len(QUESTIONS) == file.read_bytes().count(b"\n")
