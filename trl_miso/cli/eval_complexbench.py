"""`trl-miso eval complexbench`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from trl_miso.cli.arguments import command_parser, count_from, output_file
from trl_miso.evaluation.complexbench.instances import LANGUAGES, Instance, load_answers, load_instances
from trl_miso.evaluation.complexbench.judge import Estimate, Key, Task, ask_judge, judge_tasks, read_verdicts
from trl_miso.evaluation.complexbench.scores import complexbench_table, counts
from trl_miso.evaluation.endpoint import Endpoint
from trl_miso.evaluation.inference import add_arguments, respond, responses_file
from trl_miso.evaluation.responses import note_of

_USAGE = (
    "trl-miso eval complexbench --data data_final.json [--model MODEL [--backend hf|vllm|openai] ...] [--responses FILE] "
    "--verdicts FILE [--judge MODEL [--judge_base_url URL] [--dry_run] ...] [--language zh|en] [--json FILE]"
)
_ABOUT = """\
Score responses to ComplexBench's instructions by its questions and rules, and print DRFR, the share of questions that pass
with all they depend on, above the paper's Table 3. The data are data/data_final.json of github.com/thu-coai/ComplexBench.

With --model the responses are asked of it, by standard inference (--max_new_tokens is 4096 here), and kept in --responses (default:
complexbench-MODEL.jsonl). Without, those in --responses are scored.

Without --judge the verdicts in FILE are scored, which costs nothing. With it the verdicts that FILE lacks are asked of that model first,
at temperature 0, behind any OpenAI-compatible server: OPENAI_API_KEY, and --judge_base_url. What that will take is said before it
starts, and --dry_run stops there, after the responses: if these need another key, ask for them so, and judge them in a second run.
A run that was killed goes on where it was.

A question that gets no answer, or three that are neither yes nor no, stays unjudged: it is listed, the scores are printed as bounds, and
the command ends with status 1. The same command asks these questions again."""
_JUDGE_OPTIONS = ("judge_base_url", "judge_concurrency", "judge_max_tokens", "judge_prices", "dry_run")
_LISTED = 20


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    options = _parse(arguments)
    options.responses = responses_file(options, "complexbench")
    instances = load_instances(options.data, options.language)
    judged_now = options.judge and not options.dry_run
    max_tokens = options.judge_max_tokens or 4096
    # Made before responses are asked for, which may take hours, since a key may be missing.
    endpoint = judged_now and Endpoint(
        options.judge, options.judge_base_url, max_tokens=max_tokens, concurrency=options.judge_concurrency or 16
    )
    respond([instance.instruction for instance in instances], options.responses, options)
    tasks = judge_tasks(instances, load_answers(options.responses, instances), options.language)
    had = read_verdicts(options.verdicts, tasks, options.judge)
    if options.judge:
        left = [task for task in tasks if task.key not in had.passed]
        Console().print(_announcement(Estimate.of(left, max_tokens), len(tasks), options), highlight=False)
        if options.dry_run:
            return
    reasons = ask_judge(tasks, options.judge, endpoint.ask_all, options.verdicts) if endpoint else {}
    _report(instances, tasks, reasons, options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(_USAGE, _ABOUT)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="ComplexBench's data_final.json")
    parser.add_argument(
        "--responses",
        metavar="FILE",
        help='JSONL with "response", a row an instance, in order; or the benchmark\'s own, with "main_id" and "generated"',
    )
    parser.add_argument(
        "--verdicts",
        type=output_file,
        required=True,
        metavar="FILE",
        help="JSONL of the judge's verdicts, a line a question",
    )
    parser.add_argument(
        "--language", choices=LANGUAGES, default="zh", help="of instructions and questions (default: zh)"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the counts, and what is unjudged and why"
    )
    group = parser.add_argument_group("asking a judge for the verdicts that the file lacks")
    group.add_argument("--judge", metavar="MODEL", help="the server's name for it; the paper's is qwen-plus-2025-04-28")
    group.add_argument("--judge_base_url", metavar="URL", help="the server's (default: OPENAI_BASE_URL, or OpenAI)")
    group.add_argument("--judge_concurrency", type=count_from(1), metavar="N", help="questions at once (default: 16)")
    group.add_argument(
        "--judge_max_tokens",
        type=count_from(1),
        metavar="N",
        help="of an answer (default: 4096); a judge that thinks may need more",
    )
    group.add_argument(
        "--judge_prices", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens, to estimate the cost"
    )
    group.add_argument("--dry_run", action="store_const", const=True, help="say what judging will take, and stop")
    add_arguments(parser)
    parser.set_defaults(max_new_tokens=4096)
    options = parser.parse_args(arguments)
    needless = [name for name in _JUDGE_OPTIONS if getattr(options, name) is not None]
    if needless and not options.judge:
        raise ValueError(f"Got --{needless[0]} without --judge, expected both or neither. Fix: give --judge.")
    if not options.judge and not options.verdicts.exists():
        raise ValueError(
            f"Got no file {options.verdicts} and no --judge, expected one. Fix: give --judge, or correct --verdicts."
        )
    return options


def _announcement(estimate: Estimate, questions: int, options: argparse.Namespace) -> str:
    """What judging will take, said before it starts."""
    said = (
        f"{estimate.requests:,} of {questions:,} questions to ask {options.judge}: about {estimate.input_tokens:,} tokens in (estimated: "
        "one for a Chinese character, one for four others), at most "
        f"{estimate.output_tokens:,} out (--judge_max_tokens each), not counting questions that are asked again"
    )
    if not options.judge_prices:
        return f"{said}."
    least, most = estimate.cost(*options.judge_prices)
    return f"{said}; at these prices about {least:.2f} and what the answers cost, at most {most:.2f}."


def _report(
    instances: Sequence[Instance], tasks: Sequence[Task], reasons: dict[Key, str], options: argparse.Namespace
) -> None:
    """Print and write the scores; ends with status 1 where verdicts are missing."""
    verdicts = read_verdicts(options.verdicts, tasks, options.judge)
    scored = counts(instances, verdicts.passed)
    unjudged = [
        {"main_id": task.key[0], "point_id": task.key[1], "reason": reasons.get(task.key, "no verdict in the file")}
        for task in tasks
        if task.key not in verdicts.passed
    ]
    if options.json:
        written = {
            "judge": verdicts.judge,
            "language": options.language,
            "counts": {column: asdict(count) for column, count in scored.items()},
            "unjudged": unjudged,
        }
        options.json.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    note = (
        f"First line: {len(instances):,} of the benchmark's 1,150 instructions ({options.language}), {len(tasks):,} of its 5,306 "
        f"questions, judge {verdicts.judge}."
    )
    note += note_of(options.responses, [instance.instruction for instance in instances])
    Console().print(complexbench_table(Path(options.model or options.responses).absolute().name, scored, note))
    if unjudged:
        listed = [f"main_id {each['main_id']}, question {each['point_id']}: {each['reason']}" for each in unjudged]
        more = [f"and {len(unjudged) - _LISTED:,} others (--json writes all)"] if len(unjudged) > _LISTED else []
        raise SystemExit(
            f"Got no verdict on {len(unjudged):,} of {len(tasks):,} questions, so that the scores are bounds. Expected one on each. Fix: "
            "give --judge, or the same command again, which asks these only.\n  " + "\n  ".join(listed[:_LISTED] + more)
        )
