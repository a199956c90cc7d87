"""`trl-miso sft`: train. Also what the training scripts in examples/ run."""

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_miso.cli.arguments import Parsed, RecipeParser
from trl_miso.cli.preview import dry_run
from trl_miso.config import MISOSFTConfig
from trl_miso.recipe import RecipeArguments, load_rows, make_trainer, train
from trl_miso.recipes import find_file
from trl_miso.sources.crab import crab_row
from trl_miso.sources.synthetic import check_constraints

_STARTED = "TRL_MISO_STARTED"  # in the environment of processes that this command started
_ABOUT = """\
Fine-tune a model on mixtures of contexts, and save it as an ordinary checkpoint.

    trl-miso sft                                                          a small model on generated rows: minutes on a CPU
    trl-miso sft rows.jsonl --model meta-llama/Llama-3.2-1B-Instruct --learning_rate 5e-6 --output_dir my-model
    trl-miso sft --config llama3_8b_para --dry_run                        check a recipe of the paper: no GPU, no weights
    trl-miso sft --config llama3_8b_para --accelerate_config fsdp2        on 8 GPUs

`trl-miso recipes` lists the recipes and accelerate configs. With --accelerate_config, or with several GPUs, the command starts
`accelerate launch`, whose options (--num_processes, --machine_rank, ...) it takes too."""

# Settings of the small model on generated rows. What the command line or a recipe says takes precedence.
_EMBEDDED: dict[str, Any] = {
    "output_dir": "crab-miso",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
}


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parsed = _parse(arguments)
    if parsed.model_args.model_name_or_path is None:
        parsed = _parse(arguments, **_EMBEDDED)
    if parsed.recipe.dry_run:
        dry_run(parsed.recipe, parsed.args, parsed.model_args)
    elif _should_launch(parsed):
        _launch(arguments, parsed)
    else:
        run(parsed.recipe, parsed.args, parsed.model_args)


def _parse(arguments: Sequence[str], **defaults: Any) -> Parsed:
    parser = RecipeParser("sft", "[--accelerate_config CONFIG]", _ABOUT)
    parser.add(
        "--accelerate_config",
        metavar="CONFIG",
        help="a file of `accelerate config`, or a name of `trl-miso recipes`: ddp, fsdp2, zero2, zero3, ...",
    )
    launcher_options = re.findall(r"--\w+", launch_command_parser().format_help())
    return parser.parse(arguments, launcher_options, **defaults)


def _should_launch(parsed: Parsed) -> bool:
    """Whether processes are to be started: where they were asked for, or for several GPUs, and not by a process that was started."""
    if _STARTED in os.environ or "LOCAL_RANK" in os.environ:
        return False
    if parsed.options.accelerate_config or parsed.others:
        return True
    return torch.cuda.device_count() > 1 and "ACCELERATE_MIXED_PRECISION" not in os.environ


def _launch(arguments: Sequence[str], parsed: Parsed) -> None:
    """Run the same command in the processes that `accelerate launch` starts."""
    options = list(parsed.others)
    if parsed.options.accelerate_config:
        options += ["--config_file", str(find_file("accelerate config", parsed.options.accelerate_config))]
    os.environ[_STARTED] = "1"
    command = launch_command_parser().parse_args(
        [*options, "--module", "trl_miso", "sft", *_without(arguments, parsed.others)]
    )
    signal.signal(signal.SIGTERM, _pass_on)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the processes too, and they save
    try:
        launch_command(command)
    except subprocess.CalledProcessError as error:  # the process has printed why
        raise SystemExit(error.returncode) from None


def _pass_on(signum: int, _: FrameType | None) -> None:
    for process in psutil.Process().children():
        process.send_signal(signum)


def _without(arguments: Sequence[str], others: Sequence[str]) -> list[str]:
    """The arguments without `others`, which are in the same order."""
    left, kept = list(others), []
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            kept.append(argument)
    return kept


def run(recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig) -> None:
    """Train as the options say; the small model of the default answers a held-out instruction before and after."""
    trainer = make_trainer(recipe, args, model_args)
    if recipe.dataset_name is not None or model_args.model_name_or_path is not None:
        train(trainer, recipe)
        return
    held_out = crab_row(load_rows(recipe, recipe.dataset_test_split)[0])
    question = trainer.model, trainer.processing_class, held_out["full_prompt"]
    before = _answer(*question)
    train(trainer, recipe)
    after = _answer(*question)  # on every process, since each may hold a part of the model
    if trainer.is_world_process_zero():
        print(f"\nA held-out instruction: {held_out['full_prompt'][-1]['content']}")
        _show("Before", before, held_out["constraints"])
        _show("After", after, held_out["constraints"])


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> str:
    """Answer greedily by standard inference: the plain model on the plain prompt."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.eval().generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _show(title: str, text: str, constraints: list[str]) -> None:
    """Print an answer and which of the constraints it satisfies."""
    print(f"\n{title}: {text}")
    for constraint, satisfied in zip(constraints, check_constraints(constraints, text), strict=True):
        print(f"  {'[x]' if satisfied else '[ ]'} {constraint}")
