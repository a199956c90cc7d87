"""Write the model card: how contexts were made and mixed, which checks passed, scores, and how to use the model."""

import json
import os
import re
from importlib.metadata import version
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from trl.trainer.utils import get_config_model_id

from trl_miso.evaluation.callback import Scores, callbacks_of
from trl_miso.segments import decode_with, trained_spans
from trl_miso.verification.checks import Check
from trl_miso.version import __version__

_TEMPLATE = Path(__file__).with_name("model_card.md")
_ROWS_COUNTED = 1000  # rows whose contexts are counted: a card is written with every checkpoint
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SEPARATOR = re.compile(r"[/\\]")
_METHOD = (
    "MISO (Multi-Input Single-Output) fine-tuning processes an instruction as several contexts, separately from each other, and "
    "lets the output attend to a weighted mixture of them."
)
_METHODS = {
    "para": f"{_METHOD} The contexts are the full instruction, its parts and the bare request, or the contexts given in the data.",
    "succ": f"{_METHOD} The contexts are successive chunks of the input.",
    "single": 'Rows were not split (`context_mode="single"`): ordinary supervised fine-tuning, without a mixture of contexts.',
    "augment": 'Each context was an example of its own (`context_mode="augment"`), without a mixture of contexts.',
}
_TRAIN_TURNS = {
    "auto": 'every assistant turn of a conversation, every completion of a prompt, or what the row says (`train_turns="auto"`)',
    "all": 'every assistant turn, those of prompts and demonstrations too (`train_turns="all"`)',
    "last": 'the last answer of a conversation, every completion of a prompt (`train_turns="last"`)',
}
_WEIGHTINGS = {
    "uniform": "uniform (all equal, or the row's `context_weights`)",
    "fid": "fid (by attention mass)",
    "vanilla": "vanilla (one softmax over all contexts)",
}

_JUDGES = {"ifeval": "lm-eval's checkers of IFEval", "ifbench": "IFBench's checkers"}


def write_model_card(trainer: Any, model_name: str | None, dataset_name: str | None, metadata: dict[str, Any]) -> None:
    """Replace TRL's card in `output_dir` by MISO's, with TRL's tags and with links to what is on the Hub.

    Args:
        trainer: A MISOSFTTrainer whose card TRL has just written.
        model_name: The model's name; by default that of its repository or of `output_dir`.
        dataset_name: Id of a dataset on the Hub, or a local file or folder, which is named without its path.
        metadata: More fields of the card's header, such as `language` and `license`.
    """
    path = Path(trainer.args.output_dir, "README.md")
    trl_card = ModelCard.load(path)
    base_id, base_model = _named(get_config_model_id(trainer.model.config), "")
    dataset_id, dataset = _named(dataset_name, "datasets/")
    model_name = model_name or Path(trainer.args.hub_model_id or trainer.args.output_dir).absolute().name
    is_adapter = is_peft_model(trainer.model)
    scores = [callback.scores for callback in callbacks_of(trainer) if callback.scores is not None]
    header = {
        "base_model": base_id,
        "datasets": dataset_id,
        "eval_results": [result for score in scores for result in _eval_results(score)] or None,
        "library_name": "peft" if is_adapter else "transformers",
        "model_name": model_name,
        "pipeline_tag": "text-generation",
        "tags": sorted(trl_card.data.tags),
    }
    for name, value in (header | metadata).items():
        trl_card.data[name] = value
    ModelCard.from_template(
        trl_card.data,
        template_path=str(_TEMPLATE),
        name=model_name,
        base=base_model,
        base_is_local=bool(base_model) and base_id is None,
        dataset=dataset,
        is_adapter=is_adapter,
        method=_METHODS[trainer.training_mode or "para"],
        usage=_usage(trainer, trainer.hub_model_id or trainer.args.hub_model_id or model_name, is_adapter),
        badges=re.findall(r"\[<img [^\n]*?\]\([^\n]*?\)", trl_card.text),
        scores=[_scores(score) for score in scores],
        settings=_settings(trainer, is_adapter),
        checks=[_check_cells(check) for check in trainer.verification],
        versions=_versions(is_adapter),
        paper=trainer._paper,
    ).save(path)


def _named(identifier: str | None, kind: str) -> tuple[str | None, str]:
    """The id on the Hub (None for a local path), and the text for the card: a link, or the path's last part."""
    if not identifier:
        return None, ""
    if os.path.exists(identifier) or not _HUB_ID.fullmatch(identifier):
        return None, f"`{re.split(_SEPARATOR, identifier.rstrip('/'))[-1]}`"
    return identifier, f"[{identifier}](https://huggingface.co/{kind}{identifier})"


def _accuracies(scores: Scores) -> list[tuple[str, str, int, int]]:
    """(level, reading, number followed, total) for each accuracy. A user's own scorer has no strict and loose reading."""
    counts = scores.counts
    strict, loose = ("strict", "loose") if scores.benchmark in _JUDGES else ("", None)
    accuracies = [
        ("prompt", strict, counts.strict_prompt, counts.prompts),
        ("instruction", strict, counts.strict_instruction, counts.instructions),
        ("prompt", loose, counts.loose_prompt, counts.prompts),
        ("instruction", loose, counts.loose_instruction, counts.instructions),
    ]
    return [(level, reading, followed, total) for level, reading, followed, total in accuracies if reading is not None]


def _scores(scores: Scores) -> dict[str, Any]:
    """Scores on held-out prompts, as the template shows them."""
    rows: list[tuple[str, str, str]] = []
    for level, reading, followed, total in _accuracies(scores):
        name = f"{level}s, {reading}" if reading else f"{level}s"
        rows.append((name, f"{followed / total:.1%}", f"{followed:,} of {total:,}"))
    prompts = f"{scores.counts.prompts:,} held-out prompts"
    if scores.dataset_name:
        prompts += f" of {_named(scores.dataset_name, 'datasets/')[1]}"
    judge = _JUDGES.get(scores.benchmark, "the trainer's own scorer")
    return {
        "about": f"{prompts}, after step {scores.step:,}, judged by {judge}",
        "rows": rows,
        "max_new_tokens": f"{scores.max_new_tokens:,}",
        "unscored": ", ".join(map(str, scores.unscored)),
    }


def _eval_results(scores: Scores) -> list[EvalResult]:
    """Results for the card's header; none unless the prompts are from a dataset on the Hub."""
    dataset_id, _ = _named(scores.dataset_name, "datasets/")
    if dataset_id is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=dataset_id,
            dataset_name=dataset_id.split("/")[-1],
            dataset_args={"num_prompts": scores.counts.prompts},
            metric_type="accuracy",
            metric_name=f"{level}-level {reading} accuracy".replace("  ", " "),
            metric_value=round(followed / total, 4),
        )
        for level, reading, followed, total in _accuracies(scores)
    ]


def _settings(trainer: Any, is_adapter: bool) -> list[tuple[str, str]]:
    args, mode = trainer.args, trainer.training_mode or "para"
    settings = {"mode": f"`{mode}`"}
    if mode in ("para", "succ"):
        settings["weights of the contexts"] = _WEIGHTINGS[args.context_weighting]
        if args.full_context_weight is not None:
            settings["weight of the full context"] = f"{args.full_context_weight:g}"
        answers, contexts = count_answers_and_contexts(trainer.train_dataset)
        if args.train_turns != "auto" or answers:
            settings["answers that are trained"] = _TRAIN_TURNS[args.train_turns]
        if answers:
            settings["answers per example"] = answers
        settings["contexts per answer"] = contexts
    if mode == "succ":
        settings["probabilities of 1, 2, ... chunks"] = ", ".join(f"{p:g}" for p in args.chunk_probs)
    if mode in ("para", "augment"):
        settings["the full instruction is a context"] = "yes" if args.include_full else "no"
        settings["the bare request is a context"] = "yes" if args.include_bare else "no"
    if mode == "para":
        settings["rows presented as several contexts"] = f"{args.para_prob:.0%}"
        settings["positions of the output"] = args.output_positions.replace("_", " ")
    if is_adapter:
        settings["adapter"] = _adapter(trainer.model.active_peft_config)
    if (quantization := getattr(trainer.model.config, "quantization_config", None)) is not None:
        settings["base model quantized"] = _quantization(quantization)
    return list(settings.items())


def count_answers_and_contexts(dataset: Any) -> tuple[str, str]:
    """Describe how many answers an example has and how many contexts an answer, from about a thousand evenly spaced rows.

    Args:
        dataset: A prepared dataset.

    Returns:
        The two texts, the first empty if every example has one answer.
    """
    if not isinstance(dataset, Dataset):
        return "", "not counted (streamed data)"
    if "miso_layout" not in dataset.column_names:
        return "", "1"
    rows = range(0, len(dataset), ceil(len(dataset) / _ROWS_COUNTED) or 1)
    answers: list[int] = []
    contexts: list[int] = []
    for batch in dataset.select_columns(["miso_layout", "labels"]).select(rows).iter(_ROWS_COUNTED):
        for example, labels in chain.from_iterable(map(decode_with, batch["miso_layout"], batch["labels"])):
            spans = trained_spans(example, labels)
            answers.append(len(spans))
            contexts += [1] * (len(spans) - len(example.outputs))
            contexts += [len(output.branches) for output in example.outputs]
    if not contexts:
        return "", "none"
    several = sum(count > 1 for count in contexts) / len(contexts)
    counted = f"counted in {len(answers):,} examples from {len(rows):,} of {len(dataset):,} rows"
    of_answers = f"{_summary(contexts)}, several for {several:.0%} of the answers; {counted}"
    return (_summary(answers) if max(answers) > 1 else "", of_answers)


def _summary(counts: list[int]) -> str:
    return f"{sum(counts) / len(counts):.1f} on average ({min(counts)} to {max(counts)})"


def _adapter(config: Any) -> str:
    values = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "use_dora", "target_modules")}
    targets = values["target_modules"]
    if targets and not isinstance(targets, str):
        values["target_modules"] = ", ".join(sorted(targets))
    kind = getattr(config.peft_type, "value", config.peft_type)
    settings = "; ".join(f"{name} {value}" for name, value in values.items() if value)
    return f"{kind} ({settings})"


def _quantization(config: Any) -> str:
    values = config if isinstance(config, dict) else config.to_dict()
    method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    bits = values.get("bits")
    for size in (8, 4):
        if values.get(f"load_in_{size}bit"):
            bits = size
    return f"{method}, {bits} bit" if bits else str(method)


def _check_cells(check: Check) -> list[str]:
    """A check as a row of the card's table: no line breaks, and bars escaped."""
    numbers = ("" if x is None else f"{x:.2g} {check.unit}" for x in (check.measured, check.budget))
    cells = (check.name, check.status, *numbers, check.note)
    return [re.sub(r"\s+", " ", text).replace("|", "\\|") for text in cells]


def _versions(is_adapter: bool) -> dict[str, str]:
    packages = {
        "TRL": "trl",
        "Transformers": "transformers",
        "PyTorch": "torch",
        "Datasets": "datasets",
        "Tokenizers": "tokenizers",
    }
    if is_adapter:
        packages["PEFT"] = "peft"
    return {"trl-miso": __version__} | {name: version(package) for name, package in packages.items()}


def _usage(trainer: Any, model_id: str, is_adapter: bool) -> str:
    """Python code that loads the model and answers a prompt, with transformers only (and PEFT for an adapter)."""
    loader = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    imports = (
        ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        if is_adapter
        else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    )
    request = "Describe the sea in three sentences. Use no adjectives."
    if getattr(trainer.processing_class, "chat_template", None):
        prompt = [
            f'messages = [{{"role": "user", "content": "{request}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        text = json.dumps(request + (trainer.args.response_template or ""), ensure_ascii=False)
        prompt = [f'inputs = tokenizer({text}, return_tensors="pt").to(model.device)']
    return "\n".join(
        [
            *imports,
            "",
            f'model = {loader}.from_pretrained("{model_id}", device_map="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")',
            *prompt,
            "output = model.generate(**inputs, max_new_tokens=256)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )
