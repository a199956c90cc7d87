"""`trl-miso eval ifeval`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track

from trl_miso.cli.arguments import command_parser, output_file
from trl_miso.evaluation.ifeval import RANDOM_KEYS, Counts, Prompt, Scorer, Verdict, load_prompts, load_scorer, without
from trl_miso.evaluation.inference import add_arguments, respond, responses_file
from trl_miso.evaluation.responses import load_responses, note_of
from trl_miso.evaluation.table import ifeval_table

_USAGE = (
    "trl-miso eval ifeval [--model MODEL [--backend hf|vllm|openai] ...] [--responses FILE] [--data FILE] "
    "[--exclude_keys KEY ...] [--json FILE] [--samples FILE]"
)
_ABOUT = """\
Score responses to IFEval's prompts with lm-eval's checkers, and print the accuracies above the paper's: [S] strict, [L] loose,
P prompts of which every instruction is followed, I instructions. Needs pip install 'trl-miso[eval]' and NLTK's punkt_tab.

With --model the responses are asked of it, by standard inference (one user turn in its chat template, greedy), and kept in
--responses (default: ifeval-MODEL.jsonl); a run that was killed goes on where it was. Without, those in --responses are scored.
--backend openai asks a server, also one of your own (`vllm serve MODEL`, then --base_url http://localhost:8000/v1).

Keys 1122 and 1129 ask for a "letter" that is none, and the published checker draws one: leave them out
(--exclude_keys 1122 1129) for a figure without chance."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    parser = command_parser(_USAGE, _ABOUT)
    parser.add_argument("--data", metavar="FILE", help="IFEval's input_data.jsonl (default: google/IFEval on the Hub)")
    parser.add_argument("--exclude_keys", metavar="KEY", type=int, nargs="+", default=[], help="prompts to leave out")
    add_files(parser)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    options.responses = responses_file(options, "ifeval")
    score = load_scorer()
    prompts = load_prompts(options.data)
    kept = without(prompts, options.exclude_keys)
    counts = answered_counts(prompts, kept, score, options)
    note = f"First line: {counts.prompts} of {len(prompts)} prompts, {counts.instructions} instructions."
    note += note_of(options.responses, [prompt["prompt"] for prompt in prompts])
    drawn = [prompts[number]["key"] for number in kept if prompts[number]["key"] in RANDOM_KEYS]
    if drawn:
        note += f" Keys {', '.join(map(str, drawn))} are scored by chance (--exclude_keys leaves them out)."
    Console().print(ifeval_table(Path(options.model or options.responses).absolute().name, counts.percentages(), note))


def add_files(parser: argparse.ArgumentParser) -> None:
    """The files that `answered_counts` reads and writes."""
    parser.add_argument(
        "--responses",
        metavar="FILE",
        help='JSONL with "response" (and "prompt"), a row a prompt, in order',
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the counts")
    parser.add_argument("--samples", type=output_file, metavar="FILE", help="write the verdicts, a line a prompt")


def answered_counts(
    prompts: Sequence[Prompt], kept: Sequence[int], score: Scorer, options: argparse.Namespace
) -> Counts:
    """The counts of the responses to the prompts whose numbers are `kept`, after what is missing has been asked for."""
    questions = [prompt["prompt"] for prompt in prompts]
    respond(questions, options.responses, options)
    responses = load_responses(options.responses, questions)
    progress = track(kept, "Scoring", console=Console(stderr=True))
    verdicts = {number: score(prompts[number], responses[number]) for number in progress}
    counts = Counts.of(list(verdicts.values()))
    if options.samples:
        samples = (_sample(prompts[number], responses[number], verdict) for number, verdict in verdicts.items())
        options.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
    return counts


def _sample(prompt: Prompt, response: str, verdict: Verdict) -> dict[str, object]:
    """A line of --samples."""
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
