"""MISOEvalCallback: standard inference during training, scores among the metrics, and training unchanged bit for bit."""

import ast
import logging
import os
import random
import re
import signal
import socket

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.support import rank_runs
from tests.support.models import tiny_model
from tests.support.processes import PROCESSES
from trl_miso import MISOEvalCallback, MISOSFTTrainer
from trl_miso.evaluation import in_training
from trl_miso.evaluation.ifeval import Counts, Verdict

PROMPTS = [
    {"prompt": "Write about the river."},
    {"prompt": "Hello"},
    {"prompt": "Tell me, at length, about the quiet garden and the market."},
    {
        "prompt": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
            {"role": "user", "content": "é"},
        ]
    },
    {"prompt": "Where?"},
]
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}


def short_and_even(row, response):
    return [len(response) < 20, len(response) % 2 == 0]


class Seen(TrainerCallback):
    """Record the logs that trackers receive, and the end of training."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    def on_train_end(self, *args, **kwargs):
        self.logs.append("end")


@pytest.fixture
def make(para_dataset, tokenizer, make_config):
    """Make a trainer with the callback, and return both."""

    def make_trainer(
        score=short_and_even, model=None, callbacks=None, prompts=PROMPTS, callback=(), peft_config=None, **options
    ):
        rows = para_dataset.select(range(16))
        trainer = MISOSFTTrainer(
            tiny_model("llama") if model is None else model,
            make_config(**options),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        if prompts:
            settings = {"max_new_tokens": 6, "batch_size": 2} | dict(callback)
            trainer.add_callback(MISOEvalCallback(trainer, prompts, score, **settings))
            return trainer, trainer.callback_handler.callbacks[-1]
        return trainer, None

    return make_trainer


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def plain_responses(model, tokenizer, count=6):
    """Decode one prompt at a time, token by token from the logits, without padding, cache or `generate`."""
    texts = []
    for row in PROMPTS:
        chat = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        tokens = []
        while len(tokens) < count and tokenizer.eos_token_id not in tokens:
            with torch.no_grad():
                tokens.append(model(torch.tensor([ids + tokens])).logits[0, -1].argmax().item())
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return texts


# Responses


@pytest.mark.parametrize("kind", ["checkpointing", "lora", "sliding"])
def test_responses_are_those_of_the_saved_model(make, tokenizer, tmp_path, kind):
    """Reloaded as an ordinary model with transformers' attention, it gives the same responses: dropout and MISO were off."""
    options = {"max_steps": 2, "learning_rate": 1e-2, "context_mode": "para"}
    if kind == "checkpointing":
        options |= {"gradient_checkpointing": True, "use_cache": False}
    if kind == "lora":
        peft = pytest.importorskip("peft")
        adapters = {"r": 4, "lora_dropout": 0.5, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
        options |= {"peft_config": peft.LoraConfig(**adapters)}
    model = tiny_model("gemma3", sliding_window=8) if kind == "sliding" else tiny_model("llama")
    trainer, callback = make(model=model, **options)
    trainer.train()
    assert trainer.model.training and trainer.processing_class.padding_side == "right"
    trainer.save_model(str(tmp_path / "saved"))
    if kind == "lora":
        fresh = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    else:
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert fresh.config._attn_implementation == "sdpa"
    assert callback.responses == plain_responses(fresh.eval(), tokenizer)
    assert callback.responses != plain_responses(tiny_model("llama").eval(), tokenizer)


def test_training_is_not_changed_by_a_bit(make):
    """With dropout and a scorer that draws random numbers, losses and weights equal those without the callback."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "down_proj"])

    def drawing(row, response):
        return [bool(random.random() + np.random.random() + torch.rand(()) > 1)]

    seen = []
    for prompts in ([], PROMPTS):
        trainer, _ = make(drawing, prompts=prompts, max_steps=3, peft_config=lora, **EVERY_STEP)
        trainer.train()
        losses = [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]
        seen.append((losses, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]))
    (losses, weights), (others, other_weights) = seen
    assert len(losses) == 6 and losses == others
    assert all(torch.equal(p, q) for p, q in zip(weights, other_weights, strict=True))


# Scores


def test_scores_are_metrics_of_the_evaluation(make):
    """Returned and logged in one entry with the loss; equal to the shares of the scorer's verdicts."""
    seen, judged = Seen(), []

    def score(row, response):
        judged.append((row["prompt"], response))
        return {"short": len(response) < 20, "even": len(response) % 2 == 0}

    trainer, callback = make(score, callbacks=[seen], max_steps=2, **EVERY_STEP)
    judged.clear()
    trainer.train()
    assert [prompt for prompt, _ in judged] == [row["prompt"] for row in PROMPTS] * 2
    for step, entry in enumerate(evaluations(trainer), start=1):
        marks = [short_and_even(None, response) for _, response in judged[5 * (step - 1) : 5 * step]]
        assert entry["step"] == step and entry["eval_constraints_unscored"] == 0
        assert entry["eval_constraints_prompt"] == pytest.approx(np.mean([all(mark) for mark in marks]))
        assert entry["eval_constraints_inst"] == pytest.approx(np.mean(marks))
        assert entry["eval_runtime"] > entry["eval_constraints_runtime"] > 0
        logged = [logs for at, logs in seen.logs[: seen.logs.index("end")] if at == step and "eval_loss" in logs]
        assert logged == [{name: value for name, value in entry.items() if name != "step"}]
    assert callback.responses == [response for _, response in judged[5:]]
    assert callback.scores.step == 2 and callback.scores.counts.prompts == 5
    assert trainer.evaluate(metric_key_prefix="test").keys() >= {"test_loss", "test_constraints_prompt"}


def test_ifeval_is_scored_by_lm_eval(make, punkt, monkeypatch):
    """Verdicts of the published checkers, counted as by `trl-miso eval ifeval`; rows need no key."""
    comma, quoted = "punctuation:no_comma", "startend:quotation"
    rows = [
        {"prompt": "a", "instruction_id_list": [comma, quoted], "kwargs": [{}, {}]},
        {"prompt": "b", "instruction_id_list": [comma], "kwargs": [{}]},
    ]
    responses = iter([['"One"', "One, two"], ['one\n"two, too"', "three"]])
    monkeypatch.setattr(in_training, "_generate", lambda *_: next(responses))
    trainer, callback = make(None, prompts=rows, **EVERY_STEP)
    metrics = trainer.evaluate()
    assert [metrics[f"eval_ifeval_{name}"] for name in ("prompt_strict", "inst_strict")] == pytest.approx([0.5, 2 / 3])
    trainer.evaluate()
    counts = Counts.of([Verdict((False, False), (True, True)), Verdict((True,), (True,))])
    metrics = trainer.state.log_history[-1]
    names = ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose")
    assert callback.scores.counts == counts
    assert [100 * metrics[f"eval_ifeval_{name}"] for name in names] == pytest.approx(counts.percentages())
    assert 100 * metrics["eval_ifeval_average"] == pytest.approx(np.mean(counts.percentages()))
    assert metrics.keys() >= {"eval_ifeval_runtime", "eval_ifeval_unscored"}


def test_rows_of_para_are_asked_with_their_full_prompt(make, punkt, monkeypatch):
    """Also rows of `trl-miso decompose`: a null instruction is not scored, and kwargs may be JSON."""
    full, base = [[{"role": "user", "content": text}] for text in ("One two. Use no commas, kindly.", "One two.")]
    row = {
        "prompt": base,
        "full_prompt": full,
        "instruction_id_list": [None, "punctuation:no_comma"],
        "kwargs": "[{}, {}]",
    }
    monkeypatch.setattr(in_training, "_generate", lambda *_: ["one, two"])
    trainer, callback = make(None, prompts=[row])
    render = trainer.processing_class.apply_chat_template
    assert callback._prompt_ids == [render(full, add_generation_prompt=True, return_dict=True)["input_ids"]]
    assert trainer.evaluate()["eval_ifeval_inst_strict"] == 0 and callback.scores.counts.instructions == 1
    with pytest.raises(ValueError, match=r"Got \[0\] verdicts .*row 1"):
        make(None, prompts=[row | {"instruction_id_list": [None, None]}])


def test_several_sets_are_one_evaluation(make):
    """Prompts are answered once, before the first set's metrics are logged; predictions do not answer them."""
    trainer, _ = make(**EVERY_STEP)
    rows = trainer.eval_dataset
    trainer.eval_dataset = {"one": rows, "two": rows.select(range(2))}
    metrics = trainer.evaluate()
    assert metrics.keys() >= {"eval_one_loss", "eval_two_loss", "eval_constraints_prompt"}
    assert ["eval_constraints_prompt" in entry for entry in trainer.state.log_history] == [True, False]
    assert "eval_constraints_prompt" in trainer.evaluate({"three": rows})
    assert not any("constraints" in name for name in trainer.predict(rows).metrics)


@pytest.mark.parametrize(("saving", "best"), [({"save_strategy": "best"}, 3), ({"save_steps": 2}, 2)])
def test_the_best_checkpoint_and_early_stopping_use_the_scores(make, tmp_path, saving, best):
    """The scores are 0, 3, 4, 2, 2 of 5: step 5 is the second without progress. The card shows the loaded checkpoint's score."""
    followed = {1: 0, 2: 3, 3: 4}

    def score(row, response):
        step = trainers[0].state.global_step if trainers else 0
        return [PROMPTS.index({"prompt": row["prompt"]}) < followed.get(step, 2), True]

    trainers: list = []
    trainer, callback = make(
        score,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],  # before the callback
        load_best_model_at_end=True,
        metric_for_best_model="eval_constraints_prompt",
        max_steps=6,
        learning_rate=1e-2,
        **{"save_strategy": "steps"} | saving | EVERY_STEP,
    )
    trainers.append(trainer)
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.state.best_metric == 0.8
    checkpoint = tmp_path / "out" / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    saved = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), saved.parameters(), strict=True))
    assert callback.scores.step == best
    assert len([entry for entry in trainer.state.log_history if "eval_constraints_prompt" in entry]) == 5
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"after step {best}," in card and f"| prompts | {followed[best] / 5:.1%} | {followed[best]} of 5 |" in card
    trainer.evaluate()
    assert callback.scores.step == best  # the step of the loaded weights


def test_a_best_checkpoint_from_before_training_was_resumed_is_scored_anew(make, tokenizer, tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_constraints_prompt",
        "learning_rate": 1e-2,
        "max_steps": 3,
        **EVERY_STEP,
    }
    trainers: list = []

    def score(row, response):
        return [not trainers or trainers[-1].state.global_step == 1]

    first, _ = make(score, callbacks=[StopAt(2)], **options)
    trainers.append(first)
    first.train()
    again, callback = make(score, **options)
    trainers.append(again)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    scored = [(entry["step"], entry["eval_constraints_prompt"]) for entry in evaluations(again)]
    assert scored == [(1, 1.0), (2, 0.0), (3, 0.0)]  # the first run's history is part of it
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert callback.scores.step == 1 and callback.responses == plain_responses(best.eval(), tokenizer)
    assert "after step 1," in (tmp_path / "out" / "README.md").read_text()  # not the last checkpoint's card


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_without_evaluations_the_last_step_is_scored(make, tokenizer):
    """Once, before trackers close; the entry has none of the training metrics."""
    seen = Seen()
    trainer, callback = make(callbacks=[seen], max_steps=3, logging_steps=2)
    trainer.train()
    scored = [entry for entry in seen.logs[: seen.logs.index("end")] if "eval_constraints_prompt" in entry[1]]
    ((step, logs),) = scored
    assert step == callback.scores.step == 3
    assert logs.keys() == {f"eval_constraints_{name}" for name in ("prompt", "inst", "unscored", "runtime")} | {"epoch"}
    assert callback.responses == plain_responses(trainer.model.eval(), tokenizer)


def test_the_card_has_the_scores(make, tmp_path):
    """As text, and as metadata if the data set is on the Hub; the path of a local file is not shown."""
    file = tmp_path / "held_out.jsonl"
    file.touch()
    for name, shown in (
        ("google/IFEval", "(https://huggingface.co/datasets/google/IFEval)"),
        (str(file), "of `held_out.jsonl`"),
    ):
        trainer, callback = make(
            lambda row, response: [True, row["prompt"] == "Hello"], callback={"dataset_name": name}
        )
        trainer.create_model_card(model_name="sea")
        assert "Instruction following" not in (tmp_path / "out" / "README.md").read_text()
        trainer.evaluate()
        trainer.create_model_card(model_name="sea")
        card = (tmp_path / "out" / "README.md").read_text()
        section = card.split("## Instruction following")[1].split("##")[0]
        assert shown in section and "5 held-out prompts" in section and "at most 6 new tokens" in section
        assert "| prompts | 20.0% | 1 of 5 |\n| instructions | 60.0% | 6 of 10 |\n\n" in section
        assert "after step 0" in section and "failed" not in section and str(tmp_path) not in card
        header = yaml.safe_load(card.split("---")[1])
        assert ("model-index" in header) == (name == "google/IFEval")
    trainer, _ = make(callback={"dataset_name": "google/IFEval"})
    trainer.evaluate()
    trainer.create_model_card(model_name="sea", license="mit")
    loaded = ModelCard.load(tmp_path / "out" / "README.md")  # which validates the results
    first, second = loaded.data.eval_results
    assert loaded.data.model_name == "sea" and loaded.data.license == "mit"
    assert (first.task_type, first.dataset_type, first.dataset_name) == ("text-generation", "google/IFEval", "IFEval")
    assert (first.metric_name, second.metric_name) == ("prompt-level accuracy", "instruction-level accuracy")
    assert first.dataset_args == {"num_prompts": 5} and 0 <= first.metric_value <= 1


# Errors


def test_a_scorer_that_fails_during_training_does_not_end_it(make, tmp_path, caplog):
    """Whether it raises or returns another number of verdicts: the row counts as following nothing, and is named and counted."""

    def score(row, response):
        if response not in ("", "Yes.") and row["prompt"] in ("Hello", "Where?"):
            return [True] if row["prompt"] == "Where?" else {}["nothing"]
        return [True, True]

    trainer, callback = make(score, max_steps=1)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    metrics = trainer.state.log_history[-2]
    assert metrics["eval_constraints_prompt"] == metrics["eval_constraints_inst"] == 0.6
    assert metrics["eval_constraints_unscored"] == 2 and callback.scores.unscored == (2, 5)
    messages = [record.getMessage() for record in caplog.records]
    assert any(
        "on row 2 of the held-out prompts" in m and "KeyError: 'nothing'" in m and "step 1" in m for m in messages
    )
    assert any("on row 5 of the held-out prompts" in m and "Got 1 verdicts, expected 2" in m for m in messages)
    trainer.create_model_card()
    assert (
        "The scorer failed on rows 2, 5, which count as not followed." in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_model_that_fails_during_training_is_saved_first(make, tmp_path, monkeypatch):
    generate = in_training._generate
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 100, "gradient_checkpointing": True} | EVERY_STEP
    trainer, _ = make(**options)

    def out_of_memory(*args):
        if trainer.state.global_step == 2:
            raise torch.OutOfMemoryError("out of memory")
        return generate(*args)

    monkeypatch.setattr(in_training, "_generate", out_of_memory)
    with pytest.raises(RuntimeError, match=r"Got OutOfMemoryError: out of memory .*Fix: lower batch_size") as caught:
        trainer.train()
    assert caught.value.__notes__ == ["Saved checkpoint-2, the weights before the error."]
    monkeypatch.undo()
    again, callback = make(**options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == callback.scores.step == 3


def test_a_model_that_cannot_generate_fails_before_the_first_step(make, monkeypatch):
    trainer, _ = make()
    monkeypatch.setattr(trainer.model, "generate", lambda **_: {}["cache"])
    with pytest.raises(RuntimeError, match="Got KeyError: 'cache' while the model responded.*Fix: ") as caught:
        trainer.train()
    assert caught.value.__notes__ == ["Training had done 0 steps; none were saved."]


def test_unusable_prompts_scorers_and_trainers_are_refused_at_once(
    make, tokenizer, para_dataset, make_config, monkeypatch
):
    trainer, _ = make(prompts=[])
    rows = Dataset.from_list(PROMPTS[:2])
    MISOEvalCallback(trainer, rows, short_and_even, num_prompts=1, max_new_tokens=6)

    def refused(match, prompts=PROMPTS, score=short_and_even, trainer=trainer, **settings):
        with pytest.raises(ValueError, match=f"(?s)Got {match}.*expected .*Fix: "):
            MISOEvalCallback(trainer, prompts, score, **{"max_new_tokens": 6} | settings)

    refused("0 held-out prompts", [])
    for name in ("num_prompts", "max_new_tokens", "batch_size"):
        refused(f"{name}=0", **{name: 0})
    refused("5 held-out prompts with num_prompts=6", num_prompts=6)
    refused("row 2 of the held-out prompts with prompt=None", [PROMPTS[0], {"text": "a"}])
    refused("row 1 of the held-out prompts with prompt=''", [{"prompt": ""}])
    refused(
        "TemplateError|UndefinedError|TypeError|AttributeError.* from the chat template on row 1", [{"prompt": ["a"]}]
    )
    refused("max_new_tokens=600 with a prompt of 25 tokens", max_new_tokens=600)
    refused("KeyError .* from the scorer on row 1", score=lambda row, response: row["checks"])
    refused(r"ValueError \(Got \[0.5\]", score=lambda row, response: [0.5])
    refused(r"\[0\] verdicts", score=lambda row, response: [])
    refused(r"\[0, 1\] verdicts", score=lambda row, response: [True] * bool(response))
    plain = SFTTrainer(
        tiny_model("llama"), make_config(SFTConfig), train_dataset=trainer.train_dataset, processing_class=tokenizer
    )
    refused("a trainer of type SFTTrainer", trainer=plain)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    refused("a tokenizer without a chat template")


def test_stop_strings_end_a_response_in_training(make):
    trainer, callback = make()
    callback.measure()
    whole = next(text for text in callback.responses if re.search(r"[a-z]{2}.{3}", text))
    number, text = callback.responses.index(whole), re.search(r"[a-z]{2}(?=.{3})", whole).group()
    trainer.model.generation_config.stop_strings = [text]
    callback.measure()
    assert text in callback.responses[number] != whole


def test_unknown_best_metrics_and_duplicates_are_refused_when_training_begins(make):
    trainer, _ = make(metric_for_best_model="constraints_prompts")
    with pytest.raises(
        ValueError, match="Got metric_for_best_model='constraints_prompts'.*'eval_constraints_prompt'.*Fix: "
    ):
        trainer.train()
    trainer, _ = make(metric_for_best_model="eval_ifeval_prompt_strict")  # no callback measures it
    with pytest.raises(ValueError, match="Got metric_for_best_model='eval_ifeval_.*'eval_constraints_prompt'.*Fix: "):
        trainer.train()
    trainer, callback = make(metric_for_best_model="eval_ifeval_loss")
    trainer.eval_dataset = {"ifeval": trainer.eval_dataset}
    callback.on_train_begin(trainer.args, trainer.state)
    trainer, callback = make()
    trainer.add_callback(MISOEvalCallback(trainer, PROMPTS, short_and_even, max_new_tokens=6))
    with pytest.raises(ValueError, match="Got several MISOEvalCallbacks that score constraints.*Fix: "):
        trainer.train()


def test_a_terminated_run_does_not_generate(make):
    trainer, callback = make(callbacks=[rank_runs.AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM))], max_steps=3)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 2 and callback.scores is None


def test_the_chat_template_gets_the_rows_arguments(make, tokenizer, monkeypatch):
    template = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    asked = []
    monkeypatch.setattr(
        in_training, "_generate", lambda _t, _m, prompts, *_: asked.extend(prompts) or ["a"] * len(prompts)
    )
    trainer, _ = make(prompts=[])
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [{"prompt": "sea", "chat_template_kwargs": {"mood": "calm "}}, {"prompt": "sky"}]
    MISOEvalCallback(trainer, rows, short_and_even, max_new_tokens=6).measure()
    assert [tokenizer.decode(prompt) for prompt in asked] == ["calm sea:", "sky:"]


# Several processes


def rank(number, port, folder):
    """Train as one of two processes; the second then fails to generate."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer = rank_runs.make_trainer(folder, max_steps=2, verify=False, learning_rate=1e-2)
    own_prompts = []

    def score(row, response):
        own_prompts.append(row["prompt"])
        return [len(response) < 20 + random.SystemRandom().randrange(20)]

    callback = MISOEvalCallback(trainer, PROMPTS, score, max_new_tokens=6, batch_size=2)
    trainer.add_callback(callback)
    own_prompts.clear()
    trainer.train()
    trainer.save_model(folder / "saved")
    scored = callback.scores.counts.strict_prompt
    if number == 1:
        in_training._generate = lambda *_: {}["broken"]
    try:
        callback.measure()
    except RuntimeError as error:
        failed = str(error)
    (folder / str(number)).write_text(repr((callback.responses, scored, own_prompts[: 3 - number], failed)))


def test_two_ranks_share_the_prompts_and_have_the_same_scores(tmp_path, tokenizer):
    """One batch per turn, also with a scorer that differs between processes; an error on one process is raised on both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=rank, args=(number, port, tmp_path)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, "a rank hangs" if process.exitcode is None else "a rank failed"
    (first, scored, own_prompts, failed), (second, *others) = [
        ast.literal_eval((tmp_path / str(n)).read_text()) for n in (0, 1)
    ]
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert first == second == plain_responses(fresh.eval(), tokenizer)
    prompts = [row["prompt"] for row in PROMPTS]
    assert own_prompts == [prompts[0], prompts[1], prompts[4]] and others == [scored, prompts[2:4], failed]
    assert "Got KeyError: 'broken' while the model responded" in failed
