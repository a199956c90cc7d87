"""`trl-miso eval ifeval_flatten`."""

import json
from pathlib import Path

from rich.console import Console

from trl_miso.cli.arguments import command_parser, output_file
from trl_miso.cli.eval_ifeval import add_files, answered_counts
from trl_miso.evaluation.flatten import NOTE, flatten_rows, load_bases
from trl_miso.evaluation.ifeval import load_prompts, load_scorer
from trl_miso.evaluation.inference import add_arguments, responses_file
from trl_miso.evaluation.responses import note_of
from trl_miso.evaluation.table import flatten_table

_USAGE = (
    "trl-miso eval ifeval_flatten --bases FILE [--model MODEL [--backend hf|vllm|openai] ...] [--responses FILE] [--data FILE] "
    "[--write_rows FILE] [--json FILE] [--samples FILE]"
)
_ABOUT = f"""\
Score responses to IFEval's instructions one by one: 834 prompts of one instruction each.
{NOTE}
Scores are as of `trl-miso eval ifeval`; prompts and instructions are the same here, so that [S]I and [L]I are all there is.

The base instructions are data/ifeval_wo_instructions.jsonl of github.com/microsoft/llm-steer-instruct; 84 of them are mended.
--write_rows writes the prompts, in order: for --responses of your own, and for lm-eval's task of this package (see its folder,
trl_miso/evaluation/tasks)."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    parser = command_parser(_USAGE, _ABOUT)
    parser.add_argument("--data", metavar="FILE", help="IFEval's input_data.jsonl (default: google/IFEval on the Hub)")
    parser.add_argument("--bases", metavar="FILE", required=True, help="ifeval_wo_instructions.jsonl")
    parser.add_argument(
        "--write_rows", type=output_file, metavar="FILE", help="write the prompts with their instructions"
    )
    add_files(parser)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    only_writes = options.write_rows and not any((options.responses, options.model, options.json, options.samples))
    if not only_writes:
        options.responses = responses_file(options, "ifeval_flatten")
    rows = flatten_rows(load_prompts(options.data), load_bases(options.bases))
    if options.write_rows:
        options.write_rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if only_writes:
        return
    counts = answered_counts(rows, range(len(rows)), load_scorer(), options)
    _, strict, _, loose = counts.percentages()
    note = f"First line: {counts.instructions} instructions. {NOTE}"
    note += note_of(options.responses, [row["prompt"] for row in rows])
    Console().print(flatten_table(Path(options.model or options.responses).absolute().name, (strict, loose), note))
