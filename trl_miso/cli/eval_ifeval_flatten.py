"""`trl-miso eval ifeval_flatten`: score responses to IFEval's instructions, one per prompt."""

import json

from rich.console import Console

from trl_miso.cli.eval_arguments import add_model_arguments, model_request, responses_file, scored_name
from trl_miso.cli.eval_instructions import add_file_arguments, score_responses
from trl_miso.cli.parser import CommandParser, output_file
from trl_miso.evaluation.flatten import NOTE, flatten_rows, load_bases
from trl_miso.evaluation.ifeval import load_prompts, load_scorer, questions_of
from trl_miso.evaluation.responses import note_of
from trl_miso.evaluation.table import flatten_table

_USAGE = (
    "--bases FILE [--model MODEL [--backend transformers|vllm|openai] ...] [--responses FILE] [--data FILE] "
    "[--write_rows FILE] [--json FILE] [--samples FILE]"
)
_ABOUT = f"""\
Score responses to IFEval's instructions one by one: 834 prompts of one instruction each.
{NOTE}
Scores are as of `trl-miso eval ifeval`. With one instruction per prompt, [S]I and [L]I are the only ones.

The base instructions are data/ifeval_wo_instructions.jsonl of github.com/microsoft/llm-steer-instruct; 84 of them are corrected.
--write_rows writes the prompts, in order: to answer them by other means (--responses), or for lm-eval's task of this package (see
the folder trl_miso/evaluation/tasks)."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = CommandParser("eval ifeval_flatten", _USAGE, _ABOUT)
    parser.add_argument("--data", metavar="FILE", help="IFEval's input_data.jsonl (default: google/IFEval on the Hub)")
    parser.add_argument("--bases", metavar="FILE", required=True, help="ifeval_wo_instructions.jsonl")
    parser.add_argument(
        "--write_rows", type=output_file, metavar="FILE", help="write the prompts with their instructions"
    )
    add_file_arguments(parser)
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    only_writes = options.write_rows and not any((options.responses, options.model, options.json, options.samples))
    if not only_writes:
        options.responses = responses_file(options, "ifeval_flatten")
    request = model_request(options)
    rows = flatten_rows(load_prompts(options.data), load_bases(options.bases))
    if options.write_rows:
        options.write_rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if only_writes:
        return
    counts = score_responses(rows, range(len(rows)), load_scorer(), request, options)
    _, strict, _, loose = counts.percentages()
    note = f"First line: {counts.instructions} instructions. {NOTE}"
    note += note_of(options.responses, questions_of(rows))
    Console().print(flatten_table(scored_name(options), (strict, loose), note))
