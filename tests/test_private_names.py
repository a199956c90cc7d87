"""The names that TRL, transformers and accelerate may take away: each is there, and each that the package uses is listed."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from tests.support.private_names import ATTRIBUTES, NAMES, missing
from trl_miso import MISOSFTTrainer
from trl_miso.data.sft_settings import pad_token

PACKAGE = Path(__file__).parents[1] / "trl_miso"
LIBRARIES = {"accelerate", "peft", "transformers", "trl"}
DOCUMENTED = LIBRARIES | {"accelerate.logging", "accelerate.utils"}  # modules whose names without underscore are public
NAMED_TUPLES = {"_asdict", "_replace"}


class Recording(SFTTrainer):
    """Plain SFTTrainer that notes how TRL calls the method that MISO overrides."""

    def __init__(self, *args, **kwargs):
        self.calls = []
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, *args, **kwargs):
        self.calls.append((args[-1], len(args), sorted(kwargs)))
        return super()._prepare_dataset(*args, **kwargs)


@pytest.fixture(scope="module")
def trainer(tokenizer, tmp_path_factory):
    settings = {"use_cpu": True, "bf16": False, "report_to": []}
    args = SFTConfig(str(tmp_path_factory.mktemp("plain")), **settings)
    rows = Dataset.from_list([{"prompt": "Sing of the sea.", "completion": " The sea is wide."}])
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return Recording(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def used_names(source: str) -> tuple[set[str], set[str]]:
    """Imports that no documentation promises, as paths; and underscored attributes, methods and keyword arguments."""
    imports, underscored = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                if alias.name.startswith("_") or node.module not in DOCUMENTED:
                    imports.add(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            paths = {alias.name for alias in node.names}
            imports |= {path for path in paths if path.split(".")[0] in LIBRARIES and path not in DOCUMENTED}
        elif isinstance(node, ast.Attribute) and not _of_another_library(node):
            underscored.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            underscored.add(node.name)
        elif isinstance(node, ast.keyword) and node.arg:
            underscored.add(node.arg)
    return imports, {name for name in underscored if name.startswith("_") and not name.startswith("__")}


def _of_another_library(node: ast.Attribute) -> bool:
    """Whether an attribute is one of torch's operators or of flash-attn's functions."""
    return ast.unparse(node).startswith(("torch.ops.", "_operators().", "self.functions()."))


def own_names(source: str) -> set[str]:
    """Names that a file defines: functions, classes, attributes of self, fields, parameters."""
    own = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return own


def unlisted(sources: list[str], trainer: SFTTrainer) -> set[str]:
    """What the sources use of the libraries beyond the lists."""
    imports, underscored, own = set(), set(), set(NAMED_TUPLES)
    for source in sources:
        file_imports, file_underscored = used_names(source)
        imports |= file_imports
        underscored |= file_underscored
        own |= own_names(source)
    listed = set(ATTRIBUTES) | {path.rpartition(".")[2] for path in NAMES}
    for parameters, _ in NAMES.values():
        listed |= set(parameters.split())
    # An own name that the trainer also has is an override.
    foreign = {name for name in underscored if name not in own or hasattr(trainer, name)}
    return (imports - set(NAMES)) | (foreign - listed)


@pytest.mark.parametrize("path", NAMES)
def test_each_name_is_there(path):
    parameters, why = NAMES[path]
    lack = missing(path, parameters)
    assert not lack, f"{lack}. Used for: {why}."


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_each_attribute_of_a_trainer_is_there(name, trainer):
    assert hasattr(trainer, name), f"SFTTrainer has no attribute {name} any more. Used for: {ATTRIBUTES[name]}."


def test_rows_are_prepared_by_position_those_of_training_first(trainer):
    assert trainer.calls == [("train", 6, []), ("eval", 6, [])]


def test_the_model_has_a_fused_head_and_metrics_a_mode(trainer):
    ids = torch.tensor([[5, 6, 7]])
    output = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert output.log_probs.shape == output.label_mask.shape
    assert set(trainer._metrics) == {"train", "eval"}


def test_a_name_that_is_gone_is_told(monkeypatch):
    path = "transformers.trainer_utils.rotate_checkpoints"
    assert missing(path, NAMES[path][0]) == ""
    monkeypatch.setattr(transformers.trainer_utils, "rotate_checkpoints", lambda output_dir, limit, **options: None)
    assert "takes ['output_dir', 'limit', 'options'], expected" in missing(path, NAMES[path][0])
    monkeypatch.delattr(transformers.trainer_utils, "rotate_checkpoints")
    assert missing(path) == f"{path} is gone"
    monkeypatch.delattr(trl.SFTTrainer, "_prepare_dataset")
    assert missing("trl.SFTTrainer._prepare_dataset") == "trl.SFTTrainer._prepare_dataset is gone"
    assert missing("trl.no_such_module.name") == "trl.no_such_module.name is gone"


def test_every_name_that_the_package_uses_is_listed(trainer):
    assert unlisted([path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")], trainer) == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from trl.trainer.utils import pad", "trl.trainer.utils.pad"),
        ("from transformers import _version", "transformers._version"),
        ("import transformers.trainer_pt_utils", "transformers.trainer_pt_utils"),
        ("trainer._memory_tracker.start()", "_memory_tracker"),
        ("class Mixin:\n    def _inner_training_loop(self): ...", "_inner_training_loop"),
        ("model.save_pretrained(folder, _from_auto=True)", "_from_auto"),
    ],
)
def test_a_name_that_is_not_listed_is_found(source, name, trainer):
    assert unlisted([source], trainer) == {name}


def test_no_name_is_listed_in_vain():
    """Each name stands somewhere in the package's source, if only as the end of a class name."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    handed_on = {"cached_files"}  # by cached_file
    for name in set(ATTRIBUTES) | {path.rpartition(".")[2] for path in NAMES} - handed_on:
        assert name.removeprefix("Llama") in text, name


@pytest.mark.filterwarnings("error:.*v2[.]0[.]0:FutureWarning")
def test_what_trl_2_removes_is_not_relied_on(para_dataset, tokenizer, make_config, monkeypatch):
    construct = SFTTrainer.__init__

    def without_removed(
        self, *args, compute_loss_func=..., compute_metrics=..., preprocess_logits_for_metrics=..., **options
    ):
        assert {compute_loss_func, compute_metrics, preprocess_logits_for_metrics} == {...}
        construct(self, *args, **options)

    monkeypatch.setattr(SFTTrainer, "__init__", without_removed)
    model, rows = tiny_model("llama", vocab_size=len(tokenizer)), para_dataset.select(range(8))
    trainer = MISOSFTTrainer(model, make_config(max_steps=1), None, rows, rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert pad_token(SimpleNamespace(eos_token=None), tokenizer) == tokenizer.pad_token
