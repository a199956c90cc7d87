"""`trl-miso eval complexbench`: score responses to ComplexBench's instructions."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from trl_miso.cli.eval_arguments import add_model_arguments, model_request, responses_file, scored_name
from trl_miso.cli.parser import CommandParser, count_from, output_file
from trl_miso.evaluation.asking import Estimate
from trl_miso.evaluation.complexbench.instances import LANGUAGES, Instance, load_answers, load_instances, questions_of
from trl_miso.evaluation.complexbench.judge import Key, Task, ask_judge, judge_tasks, read_verdicts
from trl_miso.evaluation.complexbench.scores import complexbench_table, counts
from trl_miso.evaluation.endpoint import Endpoint
from trl_miso.evaluation.inference import respond
from trl_miso.evaluation.responses import note_of

_USAGE = (
    "--data data_final.json [--model MODEL [--backend transformers|vllm|openai] ...] [--responses FILE] "
    "--verdicts FILE [--judge MODEL [--judge_base_url URL] [--dry_run] ...] [--language zh|en] [--json FILE]"
)
_ABOUT = """\
Score responses to ComplexBench's instructions by its questions and rules, and print DRFR, the share of questions that pass
together with the questions they depend on, above the paper's Table 3. The data are data/data_final.json of
github.com/thu-coai/ComplexBench.

With --model, the model is asked for responses by standard inference (--max_new_tokens is 4096 here). They are kept in --responses
(default: complexbench-MODEL.jsonl). Without --model, the responses in --responses are scored.

Without --judge, the verdicts in FILE are scored, at no cost. With --judge, the judge is first asked for the missing verdicts, at
temperature 0, through an OpenAI-compatible server (OPENAI_API_KEY, --judge_base_url). The estimated cost is printed before.
--dry_run stops there, after the responses: use it if responses and verdicts need different keys, and judge in a second run.
A killed run resumes with what is missing.

A question without a readable verdict after three attempts stays unjudged: it is listed, the scores are printed as bounds, and the exit
status is 1. The same command asks these questions again."""
_JUDGE_OPTIONS = ("judge_base_url", "judge_concurrency", "judge_max_tokens", "judge_prices", "dry_run")
_MAX_LISTED = 20


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    options.responses = responses_file(options, "complexbench")
    request = model_request(options)
    instances = load_instances(options.data, options.language)
    max_tokens = options.judge_max_tokens or 4096
    endpoint = None
    if options.judge and not options.dry_run:
        # Before the model is asked, which may take hours: a key may be missing.
        concurrency = options.judge_concurrency or 16
        endpoint = Endpoint(options.judge, options.judge_base_url, max_tokens=max_tokens, concurrency=concurrency)
    respond([instance.instruction for instance in instances], options.responses, request)
    tasks = judge_tasks(instances, load_answers(options.responses, instances), options.language)
    passed = read_verdicts(options.verdicts, tasks, options.judge).passed
    if options.judge:
        unjudged = [task for task in tasks if task.key not in passed]
        Console().print(
            _announcement(Estimate.of([task.prompt for task in unjudged], max_tokens), len(tasks), options),
            highlight=False,
        )
        if options.dry_run:
            return
    reasons = {} if endpoint is None else ask_judge(tasks, options.judge, endpoint.ask_all, options.verdicts)
    _report(instances, tasks, reasons, options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser("eval complexbench", _USAGE, _ABOUT)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="ComplexBench's data_final.json")
    parser.add_argument(
        "--responses",
        metavar="FILE",
        help='JSONL with "response", one row per instance: joined by "prompt" or "main_id", or else in order; or the benchmark\'s own, with "main_id" and "generated"',
    )
    parser.add_argument(
        "--verdicts",
        type=output_file,
        required=True,
        metavar="FILE",
        help="JSONL of the judge's verdicts, one row per question",
    )
    parser.add_argument(
        "--language", choices=LANGUAGES, default="zh", help="language of instructions and questions (default: zh)"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the counts, and the unjudged questions with reasons"
    )
    group = parser.add_argument_group("the judge to ask for missing verdicts")
    group.add_argument(
        "--judge", metavar="MODEL", help="the server's name for the judge; the paper's is qwen-plus-2025-04-28"
    )
    group.add_argument(
        "--judge_base_url", metavar="URL", help="address of the server (default: OPENAI_BASE_URL, or OpenAI)"
    )
    group.add_argument(
        "--judge_concurrency", type=count_from(1), metavar="N", help="number of requests at once (default: 16)"
    )
    group.add_argument(
        "--judge_max_tokens",
        type=count_from(1),
        metavar="N",
        help="limit per answer, in tokens (default: 4096); a judge that thinks may need more",
    )
    group.add_argument(
        "--judge_prices",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="prices per million tokens, to estimate the cost",
    )
    group.add_argument(
        "--dry_run", action="store_const", const=True, help="print what judging will cost, and stop before it"
    )
    add_model_arguments(parser)
    parser.set_defaults(max_new_tokens=4096)
    options = parser.parse_args(arguments)
    judge_options = [name for name in _JUDGE_OPTIONS if getattr(options, name) is not None]
    if judge_options and not options.judge:
        raise ValueError(f"Got --{judge_options[0]} without --judge, expected both or neither. Fix: give --judge.")
    if not options.judge and not options.verdicts.exists():
        raise ValueError(
            f"Got no file {options.verdicts} and no --judge, expected one of them. Fix: give --judge, or correct --verdicts."
        )
    return options


def _announcement(estimate: Estimate, questions: int, options: argparse.Namespace) -> str:
    """Return the message about the cost of judging, printed before the judge is asked."""
    message = (
        f"{estimate.requests:,} of {questions:,} questions to ask {options.judge}: about {estimate.input_tokens:,} tokens in (estimated: "
        "one per Chinese character, one per four others), at most "
        f"{estimate.output_tokens:,} out (--judge_max_tokens each), not counting questions that are asked again"
    )
    return estimate.priced(message, options.judge_prices)


def _report(
    instances: Sequence[Instance], tasks: Sequence[Task], reasons: dict[Key, str], options: argparse.Namespace
) -> None:
    """Print and write the scores; exit with status 1 if verdicts are missing."""
    verdicts = read_verdicts(options.verdicts, tasks, options.judge)
    scored = counts(instances, verdicts.passed)
    unjudged = [
        {"main_id": task.key[0], "point_id": task.key[1], "reason": reasons.get(task.key, "no verdict in the file")}
        for task in tasks
        if task.key not in verdicts.passed
    ]
    if options.json:
        report = {
            "judge": verdicts.judge,
            "language": options.language,
            "counts": {column: asdict(count) for column, count in scored.items()},
            "unjudged": unjudged,
        }
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    note = (
        f"First line: {len(instances):,} of the benchmark's 1,150 instructions ({options.language}), {len(tasks):,} of its 5,306 "
        f"questions, judge {verdicts.judge}."
    )
    note += note_of(options.responses, questions_of(instances))
    Console().print(complexbench_table(scored_name(options), scored, note))
    if unjudged:
        lines = [
            f"main_id {each['main_id']}, question {each['point_id']}: {each['reason']}"
            for each in unjudged[:_MAX_LISTED]
        ]
        if len(unjudged) > _MAX_LISTED:
            lines.append(f"and {len(unjudged) - _MAX_LISTED:,} others (--json writes all)")
        raise SystemExit(
            f"Got no verdict on {len(unjudged):,} of {len(tasks):,} questions, so that the scores are bounds. Expected one verdict per "
            "question. Fix: give --judge, or repeat the command, which asks these questions only.\n  "
            + "\n  ".join(lines)
        )
