"""Options that the benchmarks of `trl-miso eval` share: the model to ask, and the files to read and write."""

import argparse
from pathlib import Path

from trl_miso.cli.parser import count_from
from trl_miso.evaluation.backends import BACKENDS
from trl_miso.evaluation.inference import ModelRequest
from trl_miso.recipes import check_path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `model_request` reads."""
    group = parser.add_argument_group("the model to ask for missing responses")
    group.add_argument(
        "--model", metavar="MODEL", help="a folder or an id on the Hub; with openai the server's name for the model"
    )
    group.add_argument(
        "--backend",
        choices=list(BACKENDS),
        help="transformers (the default), vllm (which you install), or openai (any OpenAI-compatible server; key in OPENAI_API_KEY)",
    )
    group.add_argument(
        "--max_new_tokens",
        type=count_from(1),
        default=1280,
        metavar="N",
        help="limit per response, in tokens (default: %(default)s)",
    )
    group.add_argument(
        "--batch_size",
        type=count_from(1),
        metavar="N",
        help="prompts per batch (default: for transformers as many as fit in memory; for vllm, which schedules them itself, 256)",
    )
    group.add_argument(
        "--base_url", metavar="URL", help="for openai: address of the server (default: OPENAI_BASE_URL, or OpenAI)"
    )
    group.add_argument(
        "--concurrency", type=count_from(1), metavar="N", help="for openai: number of requests at once (default: 16)"
    )


def model_request(options: argparse.Namespace) -> ModelRequest | None:
    """Return the model to ask for responses, or None without `--model`.

    Raises:
        ValueError: If an option has no effect: without `--model`, or because another backend is used. If the model is a path to nothing.
    """
    settings = {}
    for name in ("backend", "batch_size", "base_url", "concurrency"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    if options.model is not None:
        if options.backend != "openai":
            check_path(options.model)
        return ModelRequest(options.model, max_new_tokens=options.max_new_tokens, **settings)
    if settings:
        raise ValueError(f"Got --{next(iter(settings))} without --model, expected both or neither. Fix: give --model.")
    return None


def responses_file(options: argparse.Namespace, benchmark: str) -> str:
    """Return the file of the responses: `--responses`, or a file in the working folder named after benchmark and model.

    Raises:
        ValueError: If neither `--responses` nor `--model` is given.
    """
    if options.responses is not None:
        return options.responses
    if options.model is None:
        raise ValueError(
            "Got neither --responses nor --model, expected responses to score or a model to ask. Fix: give --responses or --model; or "
            "both, to choose the file for the model's responses."
        )
    return f"{benchmark}-{Path(options.model).absolute().name}.jsonl"


def scored_name(options: argparse.Namespace) -> str:
    """Return the first column of the score table: the name of the model, or of the file of responses."""
    return Path(options.model or options.responses).absolute().name
