"""Standard inference: a model's responses to prompts, one user turn each, written as they come."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer


def respond(model: str, prompts: Sequence[str], file: str | Path, batch_size: int, max_new_tokens: int) -> None:
    """Append to `file` the responses it lacks, greedily decoded, a row a prompt in the prompts' order.

    A row is written whole and flushed before the next. A run that was killed goes on with the first row that is missing, and with the
    same batches, so that the file becomes what it would have been.

    Raises:
        OSError: If the model or the file cannot be read.
        ValueError: If the file holds anything but this model's responses to these prompts, or the model has no chat template.
    """
    beginnings = [_beginning(model, max_new_tokens, prompt) for prompt in prompts]
    done = _kept_rows(Path(file), beginnings)
    if done == len(prompts):
        return
    tokenizer, loaded = _load(model)
    with Path(file).open("ab") as written, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("Responding", total=len(prompts), completed=done)
        for first in range(done - done % batch_size, len(prompts), batch_size):
            responses = _generate(tokenizer, loaded, prompts[first : first + batch_size], max_new_tokens)
            for number, response in enumerate(responses, start=first):
                if number >= done:
                    written.write(beginnings[number] + json.dumps(response).encode() + b"}\n")
                    written.flush()
                    progress.advance(task)


def _beginning(model: str, max_new_tokens: int, prompt: str) -> bytes:
    """A row up to its response: what it is a response of and to."""
    row = {"model": model, "max_new_tokens": max_new_tokens, "prompt": prompt}
    return json.dumps(row).encode()[:-1] + b', "response": '


def _kept_rows(file: Path, beginnings: Sequence[bytes]) -> int:
    """How many rows the file has, each checked to begin as it must; what a killed run wrote of another one is cut off."""
    if not file.exists():
        return 0
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        wanted = beginnings[number - 1] if number <= len(beginnings) else b""
        if line[: len(wanted)] != wanted[: len(line)] or (number > len(beginnings) and line):
            raise ValueError(
                f"Got line {number} of {file}, which is no response of this model, with this max_new_tokens, to this prompt. Expected "
                "a new file, or the one that a run to be continued wrote. Fix: give --responses another file, or score these "
                "responses without --model."
            )
    if lines[-1]:
        os.truncate(file, file.stat().st_size - len(lines[-1]))
    return len(lines) - 1


def _load(model: str) -> tuple[Any, Any]:
    """The tokenizer and the model, on the accelerator if there is one, in the dtype it is stored in."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if not tokenizer.chat_template:
        raise ValueError(
            f"Got {model}, whose tokenizer has no chat template. Expected a model for chats. Fix: save it with the template that it "
            "was trained with, or score responses of your own without --model."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return tokenizer, AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()


def _generate(tokenizer: Any, model: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy responses to one user turn each, padded on the left so that all begin at the same place."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
