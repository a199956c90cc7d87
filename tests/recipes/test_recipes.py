"""Recipes have the paper's hyperparameters and pass their dry runs on local rows; options of recipes; loading of rows."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, IterableDataset

from tests.support.models import tiny_model
from tests.support.recipes import parse_recipe
from trl_miso import MISOSFTConfig
from trl_miso.cli.preview import dry_run, main
from trl_miso.recipe import RecipeArguments, adapt_rows, load_rows, set_global_batch_size
from trl_miso.recipes import SHIPPED
from trl_miso.sources.synthetic import synthetic_rows

REPOSITORY = Path(__file__).parents[2]
RECIPES = list(SHIPPED["recipe"])

# hyperparameters of the paper's Appendices B and C
LLAMA = {"model_name_or_path": "meta-llama/Meta-Llama-3-8B", "max_length": 4096, "num_train_epochs": 3}
MISTRAL = {"model_name_or_path": "mistralai/Mistral-7B-v0.3", "max_length": 2048, "num_train_epochs": 4}
CRAB = {"learning_rate": 5e-6, "warmup_steps": 0.1, "global_batch_size": 256, "per_device_train_batch_size": 1}
CRAB |= {"dataset_name": "THU-KEG/Crab-SFT"}
PARA, SUCC = {"context_mode": "para"}, {"context_mode": "succ", "chunk_probs": [0.25] * 4}
NO_FULL, FID = {"include_full": False}, {"context_weighting": "fid"}
R1 = {"dataset_name": "tuanha1305/DeepSeek-R1-Distill", "global_batch_size": 128, "num_train_epochs": 4}
R1 |= {"source": "r1_distill"}
EXPECTED = {
    "llama3_8b_sft": CRAB | LLAMA | {"context_mode": "single"},
    "llama3_8b_para": CRAB | LLAMA | PARA,
    "llama3_8b_succ": CRAB | LLAMA | SUCC,
    "llama3_8b_para_wo_full": CRAB | LLAMA | PARA | NO_FULL,
    "llama3_8b_augment": CRAB | LLAMA | {"context_mode": "augment"},
    "llama3_8b_fid": CRAB | LLAMA | PARA | FID,
    "llama3_8b_fid_wo_full": CRAB | LLAMA | PARA | FID | NO_FULL,
    "mistral_7b_sft": CRAB | MISTRAL | {"context_mode": "single"},
    "mistral_7b_para": CRAB | MISTRAL | PARA,
    "mistral_7b_succ": CRAB | MISTRAL | SUCC,
    "llama3_8b_r1_sft": CRAB | LLAMA | R1 | {"context_mode": "single"},
    "llama3_8b_r1_succ": CRAB | LLAMA | R1 | {"context_mode": "succ", "chunk_probs": [0.55, 0.15, 0.15, 0.15]},
}


@pytest.fixture(scope="module")
def local(tmp_path_factory, tokenizer):
    """A model folder with a config and a tokenizer without a chat template, no weights; rows in Crab's and in R1's schema."""
    folder = tmp_path_factory.mktemp("local")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(folder / "model")
    config = tiny_model("llama").config
    config.vocab_size, config.max_position_embeddings = len(bare), 8192
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "model")
    Dataset.from_list(synthetic_rows(40, seed=3)).to_json(folder / "crab.jsonl")
    r1 = [{"input": f"What is {i}?", "reasoning_content": f"It is {i}. " * 9, "content": f"{i}."} for i in range(20)]
    r1[3]["reasoning_content"] = ""
    Dataset.from_list(r1).to_json(folder / "r1.jsonl")
    return folder


def arguments(local, recipe, *others):
    rows = local / ("r1.jsonl" if "r1" in recipe else "crab.jsonl")
    options = ["--model_name_or_path", local / "model", "--dataset_name", rows, "--dry_run"]
    return ["--config", recipe, *map(str, options), *others]


def test_there_is_a_recipe_for_every_row_of_the_paper():
    assert sorted(EXPECTED) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_hyperparameters_are_the_papers(recipe):
    options = yaml.safe_load(SHIPPED["recipe"][recipe].read_text())
    style = {"chat_template_path", "output_dir", "logging_steps", "save_strategy", "dataset_train_split"}
    assert {key: value for key, value in options.items() if key not in style} == EXPECTED[recipe]
    assert options["output_dir"] == recipe.replace("_", "-")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_its_dry_run(recipe, local, tmp_path, monkeypatch, capsys, wide_terminal):
    monkeypatch.chdir(tmp_path)
    dry_run(*parse_recipe(arguments(local, recipe)))
    printed = capsys.readouterr().out
    batch = EXPECTED[recipe]["global_batch_size"]
    assert f"Step: {batch} rows = 1 x {batch} accumulation steps x 1 processes." in printed
    assert "Dry run passed" in printed
    assert f"mode {EXPECTED[recipe]['context_mode']}" in printed
    assert "estimated cost, plain SFT = 1" in printed


@pytest.mark.parametrize(
    ("script", "recipe"), [("train_crab", "mistral_7b_para"), ("train_r1_distill", "llama3_8b_r1_succ")]
)
def test_dry_runs_of_the_scripts(script, recipe, local):
    command = [sys.executable, str(REPOSITORY / "examples" / f"{script}.py"), *arguments(local, recipe)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=local, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Dry run passed" in done.stdout
    if script == "train_r1_distill":
        assert "train dataset: 19 of 20 rows were split; not split: 1 no_thinking." in done.stderr


def test_a_dry_run_refuses_what_training_refuses(local):
    with pytest.raises(ValueError, match="key 'context_mod' in .*Did you mean 'context_mode'"):
        bad = local / "bad.yaml"
        bad.write_text("context_mod: para\n")
        parse_recipe(["--config", str(bad)])
    with pytest.raises(ValueError, match=r"none of which can be trained on.*max_length"):
        dry_run(*parse_recipe(arguments(local, "llama3_8b_para", "--max_length", "5")))
    windowed = local / "windowed"
    shutil.copytree(local / "model", windowed)
    config = json.loads((windowed / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (windowed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sliding window of 16 tokens"):
        dry_run(*parse_recipe(arguments(local, "mistral_7b_succ", "--model_name_or_path", str(windowed))))


def test_chat_templates_are_found_by_name(local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, args, _ = parse_recipe(arguments(local, "llama3_8b_para"))
    assert args.chat_template_path == str(SHIPPED["chat template"]["tulu"])
    (tmp_path / "tulu").mkdir()  # a folder of that name, as TRL takes one
    assert parse_recipe(arguments(local, "llama3_8b_para"))[1].chat_template_path == "tulu"
    with pytest.raises(ValueError, match=r"Got 'templates/tulu\.jinja' as chat template.*Fix"):
        parse_recipe(arguments(local, "llama3_8b_para", "--chat_template_path", "templates/tulu.jinja"))


class _Processes(MISOSFTConfig):
    """A config that reports `processes` processes."""

    processes = 1

    @property
    def world_size(self):
        return self.processes


@pytest.mark.parametrize(("processes", "per_device", "steps"), [(1, 1, 256), (8, 1, 32), (8, 4, 8), (256, 1, 1)])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(processes, per_device, steps, tmp_path):
    args = _Processes(str(tmp_path), bf16=False, per_device_train_batch_size=per_device)
    args.processes = processes
    set_global_batch_size(args, 256)
    assert args.gradient_accumulation_steps == steps
    set_global_batch_size(args, 256)  # the computed number of steps is accepted
    args.gradient_accumulation_steps = steps + 1
    with pytest.raises(ValueError, match=f"needs {steps} of {processes * per_device} rows.*Fix"):
        set_global_batch_size(args, 256)


@pytest.mark.parametrize(("processes", "per_device"), [(3, 1), (8, 3), (512, 1)])
def test_a_global_batch_that_cannot_be_kept_is_an_error(processes, per_device, tmp_path):
    args = _Processes(str(tmp_path), bf16=False, per_device_train_batch_size=per_device)
    args.processes = processes
    with pytest.raises(ValueError, match=f"expected it to be a multiple of {processes * per_device}.*Fix"):
        set_global_batch_size(args, 256)


def test_a_global_batch_is_not_kept_by_a_batch_size_that_shrinks(tmp_path):
    """transformers lowers the rows per device when memory runs out, and leaves the accumulation steps as they are."""
    args = _Processes(str(tmp_path), bf16=False, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="Got auto_find_batch_size=True.*expected.*Fix"):
        set_global_batch_size(args, 256)


# Rows


def test_sources_are_recognised(tmp_path):
    conversations = [{"id": "a", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    adapted = adapt_rows(Dataset.from_list(conversations), RecipeArguments())
    assert adapted[0]["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "miso_status" in adapt_rows(Dataset.from_list(synthetic_rows(2)), RecipeArguments()).column_names
    plain = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert adapt_rows(plain, RecipeArguments())[0] == plain[0]
    with pytest.raises(ValueError, match="Got no rows"):
        adapt_rows(plain.select([]), RecipeArguments())


def test_rows_of_strings_become_messages_only_where_asked():
    recipe = RecipeArguments(as_messages=True)
    plain = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    chat = adapt_rows(plain, recipe)
    assert chat[0] == {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    for rows in (chat, Dataset.from_list([{"text": "a"}]), Dataset.from_list(synthetic_rows(2))):
        with pytest.raises(
            ValueError, match=r"Got as_messages=True and rows with columns .*Fix: leave as_messages out"
        ):
            adapt_rows(rows, recipe)


CHAT = [{"role": "user", "content": "Name a river. Use one word."}, {"role": "assistant", "content": "Nile."}]
PUBLISHED = {
    "tulu_persona": [
        {
            "id": "a",
            "prompt": CHAT[0]["content"],
            "messages": CHAT,
            "constraints": ["length constraints:number of words"],
        },
        {"id": "b", "prompt": CHAT[0]["content"], "messages": CHAT, "constraints": ["Use one word."]},
    ],
    "ultraif": [
        {"instruction": "Name a river in one word.", "output": "Nile.", "history": history}
        for history in ([{"from": "human", "value": "Name a lake."}, {"from": "gpt", "value": "Como."}], [])
    ],
    "conifer": [
        {"prompt": CHAT[0]["content"], "messages": CHAT * 2, "type": kind}
        for kind in ("Easy-to-Hard", "Process Feedback")
    ],
    "alpaca": [
        {"instruction": "Name the longest one.", "input": given, "output": "Nile.", "text": "Below is ..."}
        for given in ("Nile, Rhine", "")
    ],
}


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_columns_are_recognised_and_pass_a_dry_run(
    source, local, tmp_path, monkeypatch, capsys, caplog, wide_terminal
):
    caplog.set_level(logging.INFO, "trl_miso")
    rows = Dataset.from_list(PUBLISHED[source])
    adapted = adapt_rows(rows, RecipeArguments())
    assert adapted.to_list() == adapt_rows(rows, RecipeArguments(source=source)).to_list()
    assert "miso_status" in adapted.column_names
    rows.to_json(tmp_path / "rows.jsonl")
    options = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--context_mode", "auto"]
    dry_run(*parse_recipe(arguments(local, "llama3_8b_para", *options)))
    assert "Dry run passed" in capsys.readouterr().out
    assert f"{int(source == 'tulu_persona')} of 2 rows were split" in caplog.text and "Dropped" not in caplog.text


def test_columns_that_other_data_sets_share_are_left_alone():
    for source, row in {source: rows[0] for source, rows in PUBLISHED.items()}.items():
        others = [row | {"completion": "b"}] if source == "tulu_persona" else [row | {"system": "Be brief."}]
        for other in others:
            assert adapt_rows(Dataset.from_list([other]), RecipeArguments())[0] == other


def test_errors_of_a_source_name_the_row(tmp_path):
    rows = Dataset.from_list([{"input": "a", "reasoning_content": "b", "content": "c"}])
    recipe = RecipeArguments(source="r1_distill", response_column="answer")
    with pytest.raises(ValueError, match=r"^Row 0: R1 row .*'answer'.*Fix"):
        adapt_rows(rows, recipe)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_every_kind_and_their_splits(streaming, tmp_path):
    rows = [{"prompt": f"{i}", "completion": "b"} for i in range(9)]
    data = Dataset.from_list(rows)
    data.to_json(tmp_path / "rows.jsonl")
    data.to_parquet(tmp_path / "rows.parquet")
    data.to_csv(tmp_path / "rows.csv")
    for suffix in ("jsonl", "parquet", "csv"):
        recipe = RecipeArguments(dataset_name=str(tmp_path / f"rows.{suffix}"), dataset_streaming=streaming)
        loaded = load_rows(recipe, "train")
        assert isinstance(loaded, IterableDataset) == streaming
        assert len(list(loaded)) == 9
        with pytest.raises(ValueError, match="has the split 'train' alone"):
            load_rows(recipe, "test")
    recipe = RecipeArguments(dataset_name=str(tmp_path / "rows.jsonl"), dataset_train_split="train[:4]")
    assert len(load_rows(recipe, "train[:4]")) == 4


@pytest.mark.parametrize("line", ['{"prompt": "a", "completion": "\\ud800"}', '{"prompt": "a"', "prompt,completion"])
def test_a_file_that_cannot_be_read_is_refused_with_the_row(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"rows\.jsonl.*cannot be read.* in row 1.*Fix"):
        load_rows(RecipeArguments(dataset_name=str(tmp_path / "rows.jsonl")), "train")


def test_a_column_of_mixed_types_is_refused_with_row_and_column(local, tmp_path):
    lines = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": {"x": 1}}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"Row 3: .*column 'completion'|cannot be read.*completion.*row 3"):
        main([str(tmp_path / "rows.jsonl")])


# The preview command (tests of its data and renderings are in tests/preview and tests/cli)


def test_preview_command(local, tmp_path, monkeypatch, capsys, wide_terminal):
    monkeypatch.chdir(tmp_path)
    main([str(local / "crab.jsonl"), "-n", "2", "--html", "page.html", "--json", "statistics.json", "--packing"])
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert statistics["rows"] == 40 and statistics["complete"] and statistics["bins"]["bins"] > 0
    assert "Row" in (tmp_path / "page.html").read_text()
    main([str(local / "crab.jsonl"), "-n", "1", "--rows", "7", "--context_mode", "succ"])
    printed = capsys.readouterr().out
    assert "only the first 7 rows read" in printed and "mode succ" in printed and "row 0" in printed
    main(["--rows", "5", "-n", "0"])
    assert "generated rows" in capsys.readouterr().out
    main([str(local / "crab.jsonl"), "--dataset_streaming", "--rows", "6", "-n", "0"])
    assert "only the first 6 rows read" in capsys.readouterr().out
