"""Imports of the server that processes are forked from: what training on a CPU imports, also where it imports late."""

import gc
import importlib
import importlib.util
import os

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # deepspeed looks for a device when it is imported

for name in (
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch._inductor.compile_fx",
    "accelerate.commands.launch",
    "tests.support.distributed_script",
    "tests.support.rank_runs",
    "tests.support.resume_runs",
    "trl_miso.cli.main",
    *(["deepspeed"] if importlib.util.find_spec("deepspeed") else []),
):
    importlib.import_module(name)

gc.collect()
gc.freeze()  # every training collects
