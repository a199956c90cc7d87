"""What the benchmarks share whose prompts have instructions that a program checks: IFEval, IFEval-Flatten, IFBench and Multi-IF."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trl_miso.cli.eval_arguments import add_model_arguments, model_request, responses_file, scored_name
from trl_miso.cli.parser import CommandParser, output_file
from trl_miso.evaluation.ifeval import Counts, IFEvalPrompt, Scorer, Verdict, questions_of, without
from trl_miso.evaluation.inference import ModelRequest, respond
from trl_miso.evaluation.responses import load_responses, note_of

_USAGE = (
    "[--model MODEL [--backend transformers|vllm|openai] ...] [--responses FILE] [--data FILE] "
    "[--exclude_keys KEY ...] [--json FILE] [--samples FILE]"
)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in IFEval's format.

    Attributes:
        name: Of the command, and of the default file of responses.
        about: The command's description.
        data: Help of `--data`.
        key: Type of the prompts' keys.
        load_prompts: Reads `--data`, or the benchmark's own data without it.
        load_scorer: Returns the scorer of these prompts.
        random_keys: Returns the keys of those that are scored by chance.
        table: Lays out name, percentages and note.
    """

    name: str
    about: str
    data: str
    key: type
    load_prompts: Callable[[str | None], list[IFEvalPrompt]]
    load_scorer: Callable[[Sequence[IFEvalPrompt]], Scorer]
    random_keys: Callable[[Sequence[IFEvalPrompt]], Sequence[int | str]]
    table: Callable[[str, Sequence[float], str], Table]


def run(benchmark: Benchmark, arguments: list[str]) -> None:
    """Run the command of a benchmark."""
    parser = CommandParser(f"eval {benchmark.name}", _USAGE, benchmark.about)
    parser.add_argument("--data", metavar="FILE", help=benchmark.data)
    parser.add_argument(
        "--exclude_keys", metavar="KEY", type=benchmark.key, nargs="+", default=[], help="prompts to leave out"
    )
    add_file_arguments(parser)
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    options.responses = responses_file(options, benchmark.name)
    request = model_request(options)
    prompts = benchmark.load_prompts(options.data)
    kept = without(prompts, options.exclude_keys)
    scored = [prompts[number] for number in kept]
    # Before the model is asked, which may take hours: both find what is missing.
    score, random_keys = benchmark.load_scorer(scored), benchmark.random_keys(scored)
    counts = score_responses(prompts, kept, score, request, options)
    note = f"First line: {counts.prompts} of {len(prompts)} prompts, {counts.instructions} instructions."
    note += note_of(options.responses, questions_of(prompts))
    if random_keys:
        note += f" Keys {', '.join(map(str, random_keys))} are scored by chance (--exclude_keys leaves them out)."
    Console().print(benchmark.table(scored_name(options), counts.percentages(), note))


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the files that `score_responses` reads and writes."""
    parser.add_argument(
        "--responses",
        metavar="FILE",
        help='JSONL with "response", one row per prompt: joined by "prompt" or "key", or else in the order of the data',
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the counts")
    parser.add_argument(
        "--samples", type=output_file, metavar="FILE", help="write the verdicts as JSONL, one row per prompt"
    )


def score_responses(
    prompts: Sequence[IFEvalPrompt],
    kept: Sequence[int],
    score: Scorer,
    request: ModelRequest | None,
    options: argparse.Namespace,
) -> Counts:
    """Ask for missing responses, score those to the prompts numbered `kept`, and write `--json` and `--samples`."""
    questions = questions_of(prompts)
    respond(questions.prompts, options.responses, request)
    responses = load_responses(options.responses, questions)
    answered = [(prompts[number], responses[number]) for number in kept]
    counts, samples = score_answered(answered, score)
    write_scores(asdict(counts), samples, options)
    return counts


def score_answered(
    answered: Sequence[tuple[IFEvalPrompt, str]], score: Scorer
) -> tuple[Counts, list[dict[str, object]]]:
    """Score each prompt's response; return the counts and the rows of `--samples`."""
    verdicts, samples = [], []
    for prompt, response in track(answered, "Scoring", console=Console(stderr=True)):
        verdict = score(prompt, response)
        verdicts.append(verdict)
        samples.append(_sample(prompt, response, verdict))
    return Counts.of(verdicts), samples


def write_scores(
    counts: Mapping[str, object], samples: Sequence[Mapping[str, object]], options: argparse.Namespace
) -> None:
    """Write `--json` and `--samples`, where they are given."""
    if options.samples:
        options.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _sample(prompt: IFEvalPrompt, response: str, verdict: Verdict) -> dict[str, object]:
    """Return a row of --samples."""
    return {
        "key": prompt["key"],
        "prompt": prompt["prompt"],
        "response": response,
        "instruction_id_list": prompt["instruction_id_list"],
        "strict_prompt": all(verdict.strict),
        "strict_instruction": verdict.strict,
        "loose_prompt": all(verdict.loose),
        "loose_instruction": verdict.loose,
    }
