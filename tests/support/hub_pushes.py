"""Train and push to the Hub at HF_ENDPOINT in every way, and write the results to FOLDER/results.json, for test_hub.py.

Runs as `python -m tests.support.hub_pushes FOLDER`, a process of its own, since the client reads HF_ENDPOINT on import. FOLDER has
`base` (a model with its tokenizer) and `rows` (prepared data).
"""

import copy
import errno
import json
import logging
import os
import sys
import time
import types
import urllib.request
from pathlib import Path

import datasets
import huggingface_hub.utils._http
import peft
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM

from trl_miso import MISOSFTConfig, MISOSFTTrainer

TOKEN = "hf_secretOfAna"
IDS = torch.arange(5, 25)[None]
FOLDER = Path(sys.argv[-1])
SHIFTS = iter(range(1, 100))

warnings: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())


def main():
    # The client would wait 23 seconds in all between its retries.
    huggingface_hub.utils._http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    logging.getLogger("trl_miso.training.hub").addHandler(handler)
    scenarios = [whole, every_save, last_checkpoint, branch, dropped, refused, unreachable, background, xet]
    results = {scenario.__name__: scenario() for scenario in scenarios}
    (FOLDER / "results.json").write_text(json.dumps(results))


def trainer_of(name, **options):
    options = {"save_strategy": "no", "max_steps": 2, "verify": False} | options
    config = MISOSFTConfig(
        output_dir=str(FOLDER / name),
        hub_model_id=f"ana/{name}",
        hub_token=TOKEN,
        per_device_train_batch_size=4,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
        **{key: value for key, value in options.items() if key != "peft_config"},
    )
    rows = datasets.load_from_disk(FOLDER / "rows")
    base = str(FOLDER / "base")
    trainer = MISOSFTTrainer(base, config, train_dataset=rows, peft_config=options.get("peft_config"))
    trained = next(p for p in trainer.model.parameters() if p.requires_grad)
    trained.data += next(SHIFTS) / 100  # otherwise the Hub would already have these weights
    return trainer


def faults(*patterns_times_status_late):
    keys = ("pattern", "times", "status", "late")
    body = json.dumps([dict(zip(keys, fault, strict=False)) for fault in patterns_times_status_late]).encode()
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/_faults", data=body).close()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS.to(model.device)).logits


def fails(push):
    """Push; return the error, and whether the model on disk equals the trainer's."""
    trainer, message = push.__self__, ""
    try:
        push()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    try:
        local = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    except (OSError, ValueError):
        return {"error": message, "intact": False}
    return {"error": message, "intact": torch.equal(logits(local), logits(trainer.model))}


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def whole():
    """A push by hand after training, to a private repository."""
    trainer = trainer_of("whole", hub_private_repo=True, verify=True)
    trainer.train()
    trainer.push_to_hub("First push", dataset_name=str(FOLDER / "rows"), license="apache-2.0")
    torch.save(logits(trainer.model), FOLDER / "whole.pt")
    kept = copy.deepcopy(trainer.args).hub_token, trainer.args.hub_token
    trainer._save = _full
    return {"kept": [str(token) for token in kept], "unsaved": fails(trainer.push_to_hub)["error"]}


def every_save():
    """Each upload is still running, with its files hashed but not sent, when the next one is due."""
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    trainer = trainer_of("every_save", **options)
    faults((r"POST .*\.git/info/lfs/objects/batch", 9, 0, 1.0))
    warnings.clear()
    trainer.train()
    next(trainer.model.parameters()).data += 1
    trainer.save_model()
    next(trainer.model.parameters()).data += 1
    trainer.push_to_hub("In the background", blocking=False)
    next(trainer.model.parameters()).data += 1
    trainer.push_to_hub("Last push")
    faults()
    return {"warnings": warnings[:]}


def last_checkpoint():
    """An adapter on a base model in a local folder."""
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2, "hub_strategy": "checkpoint"}
    trainer = trainer_of("last_checkpoint", peft_config=lora, **options)
    trainer.train()
    trainer.push_to_hub()
    torch.save(logits(trainer.model), FOLDER / "last_checkpoint.pt")
    return {"warnings": warnings[:]}


def branch():
    HfApi().create_repo("ana/branch", token=TOKEN)
    HfApi().create_branch("ana/branch", branch="dev/1", token=TOKEN)
    trainer_of("branch", hub_revision="dev/1").push_to_hub()
    return {}


def dropped():
    """The connection breaks in the second part of the weights, first on every try, then once."""
    trainer = trainer_of("dropped")
    faults((r"PUT /_lfs/\w+/2", 6, 0))
    result = fails(trainer.push_to_hub)
    faults((r"PUT /_lfs/\w+/2", 1, 0), (r"PUT /_lfs/\w+/3", 2, 503))
    trainer.push_to_hub()
    return result


def refused():
    return fails_then_pushes("refused", ("POST .*/commit/", 1, 403))


def unreachable():
    """Creating the repository fails; the trained model is on disk all the same."""
    return fails_then_pushes("unreachable", ("POST /api/repos/create", 1, 0))


def fails_then_pushes(name, fault):
    trainer = trainer_of(name)
    faults(fault)
    result = fails(trainer.push_to_hub)
    trainer.push_to_hub()
    return result


def background():
    """The upload of the first checkpoint fails, and the second succeeds."""
    warnings.clear()
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    trainer = trainer_of("background", **options)
    faults(("POST .*/commit/", 1, 500))
    trainer.train()
    training_warnings = warnings[:]
    faults(("POST .*/commit/", 1, 500))
    future = trainer.push_to_hub(blocking=False, dataset_name="ana/rows")
    failure = future.exception()
    trainer.push_to_hub("Last push", dataset_name="ana/rows")
    return {
        "step": trainer.state.global_step,
        "warnings": training_warnings,
        "future": type(failure).__name__,
        "warnings_of_future": warnings[len(training_warnings) :],
    }


def xet():
    """The client uses Xet by default, and this Hub has no Xet store."""
    trainer = trainer_of("xet")
    constants.HF_HUB_DISABLE_XET = False
    result = fails(trainer.push_to_hub)
    constants.HF_HUB_DISABLE_XET = True
    trainer.push_to_hub()
    return result


if __name__ == "__main__":
    main()
