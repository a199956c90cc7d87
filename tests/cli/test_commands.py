"""What a preview leaves alone, whatever the settings of training are; and the command."""

import copy
import json
import logging
import socket
import sys

import pytest
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from transformers import LlamaConfig

from tests.data.test_tokenization import TEMPLATES, make_tokenizer
from tests.preview.test_preview import SHAPE, some_rows, trainer_of
from tests.support.recipes import parse_recipe
from trl_miso.cli.main import main
from trl_miso.cli.preview import preview_recipe
from trl_miso.preview import preview_dataset


@pytest.fixture
def rows(para_dataset):
    return some_rows(para_dataset)


# Settings

HOSTILE = {
    "bf16": True,
    "push_to_hub": True,
    "hub_model_id": "nobody/nothing",
    "report_to": ["wandb", "tensorboard"],
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_on_start": True,
    "fsdp": "full_shard auto_wrap",
    "torch_compile": True,
    "optim": "adamw_bnb_8bit",
    "loss_type": "dft",
    "label_smoothing_factor": 0.1,
    "router_aux_loss_coef": 0.01,
    "activation_offloading": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"selective": False},
    "accelerator_config": {"dispatch_batches": True, "gradient_accumulation_kwargs": {"num_steps": 2}},
    "use_liger_kernel": True,
    "full_determinism": True,
    "attention_kernel": "flash_attn",
    "model_init_kwargs": {"dtype": "bfloat16", "device_map": "auto", "quantization_config": {"load_in_4bit": True}},
    "packing": True,
    "padding_free": True,
    "shuffle_dataset": True,
    "pad_to_multiple_of": 8,
    "include_num_input_tokens_seen": True,
    "dataset_kwargs": {},
}


def test_settings_of_training_change_nothing_and_nothing_is_touched(
    rows, make_config, tokenizer, tmp_path, monkeypatch
):
    plain = preview_dataset(rows, tokenizer, make_config(max_length=160), SHAPE)

    def refuse(*_):
        raise AssertionError("a preview asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    args = make_config(max_length=160, **HOSTILE)
    # what TrainingArguments makes where DeepSpeed is installed, and where a process sees two GPUs
    args.deepspeed, args.deepspeed_plugin, args._n_gpu = {"zero_optimization": {"stage": 3}}, object(), 2
    before, state = (
        copy.deepcopy(args.to_dict()),
        (dict(AcceleratorState._shared_state), dict(PartialState._shared_state)),
    )
    fingerprint, template, size = rows._fingerprint, tokenizer.chat_template, len(tokenizer)
    shown = preview_dataset(rows, tokenizer, args, SHAPE)
    assert shown["statistics"].pop("bins")
    plain["statistics"].pop("bins")
    assert shown == plain
    assert args.to_dict() == before
    assert args.accelerator_config.dispatch_batches is True
    assert (rows._fingerprint, tokenizer.chat_template, len(tokenizer)) == (fingerprint, template, size)
    assert (dict(AcceleratorState._shared_state), dict(PartialState._shared_state)) == state
    assert list(tmp_path.iterdir()) == []


def test_trainers_made_before_a_preview_and_after_it_train_as_they_would(rows, tokenizer, make_config):
    """In the precision that their settings say: what the first trainer tells accelerate, later ones cannot change."""
    early, middle, late = (make_config(max_length=160, bf16=True, max_steps=1) for _ in range(3))
    preview_dataset(rows, tokenizer, early, SHAPE)
    before = trainer_of(rows, tokenizer, early)
    preview_dataset(rows, tokenizer, middle, SHAPE)
    before.train()
    after = trainer_of(rows, tokenizer, late)
    assert before.accelerator.mixed_precision == after.accelerator.mixed_precision == "bf16"


def test_noise_that_prevents_sharing_is_counted(rows, tokenizer, make_config):
    settings = (make_config(max_length=160, neftune_noise_alpha=alpha) for alpha in (None, 5.0))
    shared, noisy = (preview_dataset(rows, tokenizer, args, SHAPE)["statistics"]["tokens"] for args in settings)
    assert noisy["saved"] == 0 < shared["saved"]
    assert noisy["unique"] == shared["unshared"]


@pytest.mark.parametrize("form", ["template.jinja", "folder"])
def test_the_template_is_that_of_training(form, rows, tokenizer, make_config, tmp_path):
    """Of a folder TRL takes the template and the tokens, and fills up to a multiple of 64."""
    bare, path = copy.deepcopy(tokenizer), tmp_path / form
    bare.chat_template = None
    if form == "folder":
        make_tokenizer("qwen3").save_pretrained(path)
    else:
        path.write_text(TEMPLATES["tulu"])
    args = make_config(chat_template_path=str(path), max_length=160)
    trainer = trainer_of(rows, copy.deepcopy(bare), args)
    expected = {row["miso_row"][0]: row["input_ids"] for row in trainer.train_dataset}
    shown = preview_dataset(rows, bare, args, SHAPE, rows=1000)["rows"]
    assert {row["index"]: row["ids"] for row in shown if not row["dropped"]} == expected
    assert any(row["cut"] for row in shown)
    assert any(i >= len(bare) for ids in expected.values() for i in ids) == (form == "folder")
    assert (bare.chat_template, len(bare)) == (None, len(tokenizer))


def test_the_log_says_once_what_was_dropped(rows, tokenizer, make_config, caplog):
    with caplog.at_level(logging.INFO):
        preview_dataset(rows, tokenizer, make_config(max_length=160), SHAPE)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("trl_miso")]
    assert len(lines) == len(set(lines)) == 5  # train_turns, two reasons, what was cut, and the mixture


# The command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, crab_rows, wide_terminal):
    """Runs the command in a folder with rows: what it exits with, and prints to both outputs."""
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(crab_rows[:30]).to_json("rows.jsonl")

    def run(line):
        monkeypatch.setattr(sys, "argv", ["trl-miso", *line.split()])
        code = None
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return run


def test_what_the_command_writes(command, tmp_path):
    code, said = command("preview rows.jsonl -n 2 --html page.html --json said.json --max_length 300 --packing")
    assert code is None
    *others, page, statistics, end = said.out.split("\n")
    assert (page, statistics, end) == ("Wrote page.html", "Wrote said.json", "")
    assert "token counts are not those of a real model" in " ".join(others)
    statistics = json.loads((tmp_path / "said.json").read_text())
    assert (statistics["rows"], statistics["complete"], statistics["mode"]) == (30, True, "para")
    data = (tmp_path / "page.html").read_text().split('id="preview">')[1].split("</script>")[0]
    whole = json.loads(data)
    assert whole["statistics"] == statistics
    assert [row["index"] for row in whole["rows"]][:2] == [0, 1]
    code, said = command("preview rows.jsonl -n 1 --rows 7 --context_mode succ")
    assert code is None
    assert "Warning: the tokenizer is built from these rows" in said.out
    assert "only the first 7 rows read" in said.out and "row 0" in said.out and "row 1" not in said.out


def test_a_recipe_gives_options_and_the_command_line_overrides_them(command, tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: elsewhere\ncontext_mode: succ\nmax_length: 300\n")
    for line, mode in (("", "succ"), (" --context_mode single", "single")):
        for config in (" --config recipe.yaml", " --config=recipe.yaml"):
            code, _ = command(f"preview rows.jsonl --json said.json{config}{line}")
            assert code is None
            assert json.loads((tmp_path / "said.json").read_text())["mode"] == mode
    (tmp_path / "recipe.yaml").write_text("dataset_name: rows.jsonl\n")
    code, said = command("preview -n 0 --config recipe.yaml")
    assert code is None and "rows.jsonl" in said.out


def test_a_stream_is_read_as_far_as_a_file_is(command, tmp_path):
    written = []
    for options in ("", "--dataset_streaming ", "--dataset_streaming --rows 30 "):
        assert command(f"preview rows.jsonl {options}--json said.json")[0] is None
        written.append(json.loads((tmp_path / "said.json").read_text()))
    assert written[0] == written[1]
    # that the thirtieth row was the last is not known
    assert written[2] == written[0] | {"complete": False}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("sft", "eq. 3), 'fid' (by attention mass; eq. 7) or 'vanilla'"),
        ("decompose", "--prices IN OUT"),
        ("eval complexbench", "--judge_prices IN OUT"),
    ],
)
def test_help_has_whole_sentences_and_names_the_values_of_an_option(command, line, text):
    code, said = command(f"{line} --help")
    assert code == 0
    assert text in " ".join(said.out.split())


@pytest.mark.parametrize("line", ["", "-h", "--help", "preview --help", "preview -h", "preview --help-all"])
def test_help(command, line):
    code, said = command(line)
    assert code == 0
    assert said.out.startswith("usage: trl-miso ")
    assert ("--html FILE" in said.out) == line.startswith("preview")


YAML_FILES = {
    "typo": "learning_rate: 1e-4\ncontext_mod: para\n",
    "broken": "a: [1\nb: 2\n",
    "scalar": "chunk_probs: 0.5\n",
    "word": "num_train_epochs: three\n",
}


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (
            "paint",
            2,
            "got command 'paint', expected one of sft, recipes, decompose, preview, verify, readout, report, eval.",
        ),
        ("previw", 2, "Did you mean 'preview'?"),
        ("preview rows.jsonl -n x", 2, "argument -n/--num_rows: got 'x', expected a whole number of at least 0"),
        ("preview rows.jsonl -n -1", 2, "argument -n/--num_rows: got '-1', expected a whole number of at least 0"),
        ("preview rows.jsonl --rows 0", 2, "argument --rows: got '0', expected a whole number of at least 1"),
        ("preview rows.jsonl --config", 2, "argument --config: expected one argument"),
        ("preview rows.jsonl --html no/page.html", 2, "got 'no/page.html', expected a file in a folder that exists"),
        ("preview rows.jsonl --context_mode parra", 2, "invalid choice: 'parra'"),
        ("preview rows.jsonl --context_mode parra", 2, "Did you mean 'para'?"),
        ("preview rows.jsonl --max-length x", 2, "argument --max_length: invalid"),
        ("preview rows.jsonl --contxt_mode para", 2, "unknown option --contxt_mode. Did you mean '--context_mode'?"),
        ("preview rows.jsonl --max_length 300 x", 2, "got 'x', which no option takes."),
        ("preview rows.jsnl", 1, "Got 'rows.jsnl', which does not exist. Did you mean 'rows.jsonl'? Fix"),
        ("preview rows.jsonl --model ./no/model", 1, "Got './no/model', which does not exist."),
        (
            "preview rows.jsonl --model nobody/nothing",
            1,
            "Got the model 'nobody/nothing', whose tokenizer cannot be loaded",
        ),
        ("preview empty.jsonl", 1, "Got empty.jsonl, which is empty"),
        ("preview rows.jsonl --config elsewhere.yaml", 1, "Got 'elsewhere.yaml' as recipe, expected a file or a name"),
        ("preview rows.jsonl --config llama3_8b_par", 1, "Did you mean 'llama3_8b_para'?"),
        (
            "preview rows.jsonl --config typo.yaml",
            1,
            "Got the key 'context_mod' in typo.yaml, which is no option. Did you mean 'c",
        ),
        ("preview rows.jsonl --config broken.yaml", 1, "Got broken.yaml, line 2, which is no YAML"),
        ("preview rows.jsonl --config empty.jsonl", 1, "Got empty.jsonl, which has no keys"),
        ("preview rows.jsonl --config scalar.yaml", 1, "Got chunk_probs: 0.5 in scalar.yaml, expected a list."),
        ("preview rows.jsonl --config word.yaml", 2, "argument --num_train_epochs: invalid float value: 'three'"),
        ("preview rows.jsonl --max_length 2", 1, "none of which can be trained on"),
        ("preview -n 1 rows.jsonl --para_prob 2", 1, "Got para_prob=2.0"),
        ("sft rows.jsonl --num_proceses 2", 2, "unknown option --num_proceses. Did you mean '--num_processes'?"),
        ("sft rows.jsonl --accelerate_config fsdp3", 1, "Got 'fsdp3' as accelerate config, expected a file or a name"),
        ("sft rows.jsonl --chat_template_path tulo.jinja", 1, "Got 'tulo.jinja' as chat template"),
        ("sft rows.jsonl --source r1_distill", 1, "Row 0: "),
        ("recipes llama3", 1, "Got name 'llama3', expected one of the names"),
        (
            "eval ifevl",
            1,
            "got benchmark 'ifevl', expected one of ifeval, ifeval_flatten, ifbench, multi_if, complexbench. Did you mean 'ifeval'?",
        ),
        ("report rows.jsonl --model model --compare ./no", 1, "Got './no', which does not exist."),
        ("readout rows.jsonl --model ./no", 1, "Got './no', which does not exist."),
        ("verify rows.jsonl --model ./no", 1, "Got './no', which does not exist."),
        ("eval ifeval --model ./no", 1, "Got './no', which does not exist."),
        (
            "eval ifeval --data misng.jsonl --model gpt2",
            1,
            "Got 'misng.jsonl', which does not exist. Did you mean 'missing.jsonl'?",
        ),
        ("eval ifeval --data empty.jsonl --model gpt2", 1, "Got no prompts in empty.jsonl"),
        ("eval ifeval --modl x", 2, "unknown option --modl. Did you mean '--model'?"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(command, line, code, message, tmp_path):
    for name in ("empty.jsonl", "missing.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    for name, text in YAML_FILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    got, said = command(line)
    if isinstance(got, str):  # a text to leave with is printed, and the code is 1
        got, said = 1, got
    else:
        said = said.out + said.err
    lines = [text for text in said.splitlines() if text.startswith("trl-miso")]
    assert (got, len(lines)) == (code, 1)
    assert lines[0].startswith(f"trl-miso{'' if code == 2 and line in ('paint', 'previw') else ' ' + line.split()[0]}")
    assert message in lines[0]
    assert "Traceback" not in said


def test_a_dry_run_without_a_model_has_the_settings_of_the_example(command):
    code, said = command("sft --dry_run --dry_run_rows 20")
    assert code is None and "Step: 16 rows = 16 x 1 accumulation steps" in said.out


def test_flags_need_no_value(command, tmp_path):
    """Also before the data set, and for options that are None by default."""
    for line in (
        "--packing rows.jsonl",
        "rows.jsonl --packing",
        "rows.jsonl --packing true",
        "rows.jsonl --packing=True",
    ):
        assert command(f"preview {line} --bf16 no --json said.json")[0] is None
        statistics = json.loads((tmp_path / "said.json").read_text())
        assert statistics["bins"] and statistics["rows"] == 30
    for line, value in (
        ("--bf16 --use_cpu", True),
        ("--bf16 no", False),
        ("--no_include_bare", False),
        ("--verify", True),
    ):
        _, args, _ = parse_recipe(line.split())
        assert getattr(args, line.split()[0].removeprefix("--no_").removeprefix("--")) == value


def test_names_that_mean_the_same(command, tmp_path):
    for line in ("--model a --dataset b", "--model_name_or_path a --dataset_name b", "b --model-name-or-path a"):
        recipe, _, model_args = parse_recipe(line.split())
        assert (recipe.dataset_name, model_args.model_name_or_path) == ("b", "a")
    shown = [command(f"preview rows.jsonl {option} 2")[1].out for option in ("-n", "--num_rows", "--num_rows")]
    assert shown[0] == shown[1] and "row 1" in shown[0] and "row 2" not in shown[0]


def test_adapters_with_dropout_share_no_prefixes(command, tmp_path):
    """As in training, where noise makes equal tokens unequal."""
    saved = {}
    for options in ("", "--use_peft", "--use_peft --lora_dropout 0"):
        assert command(f"preview rows.jsonl --json said.json {options}")[0] is None
        saved[options] = json.loads((tmp_path / "said.json").read_text())["tokens"]["saved"]
    assert saved["--use_peft"] == 0 < saved[""] == saved["--use_peft --lora_dropout 0"]


def test_a_recipe_of_quantization_asks_for_no_weights(command, tokenizer, tmp_path):
    """The model's folder has a config and a tokenizer alone; what would load it needs a GPU."""
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    options = "--load_in_4bit --use_peft --attn_implementation flash_attention_2 --dtype bfloat16 --push_to_hub"
    line = f"--model_name_or_path {tmp_path / 'model'} --dataset_name rows.jsonl --output_dir out {options}"
    said, config = preview_recipe(*parse_recipe(line.split()), 1, None)
    assert said["statistics"]["model"] == str(tmp_path / "model")
    assert said["statistics"]["warnings"] == []
    assert config.hidden_size == 64
    assert not (tmp_path / "out").exists()
