"""`trl-miso eval ifeval`: score responses to IFEval's prompts."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import track

from trl_miso.cli.eval_arguments import add_model_arguments, model_request, responses_file, scored_name
from trl_miso.cli.parser import CommandParser, output_file
from trl_miso.evaluation.ifeval import (
    RANDOM_KEYS,
    Counts,
    IFEvalPrompt,
    Scorer,
    Verdict,
    load_prompts,
    load_scorer,
    questions_of,
    without,
)
from trl_miso.evaluation.inference import ModelRequest, respond
from trl_miso.evaluation.responses import load_responses, note_of
from trl_miso.evaluation.table import ifeval_table

_USAGE = (
    "[--model MODEL [--backend hf|vllm|openai] ...] [--responses FILE] [--data FILE] "
    "[--exclude_keys KEY ...] [--json FILE] [--samples FILE]"
)
_ABOUT = """\
Score responses to IFEval's prompts with lm-eval's checkers, and print the accuracies above the paper's: [S] strict, [L] loose,
P prompts (every instruction followed), I instructions. Needs pip install 'trl-miso[eval]' and NLTK's punkt_tab.

With --model, the model is asked for responses by standard inference (one user turn in its chat template, greedy). They are kept
in --responses (default: ifeval-MODEL.jsonl), and a killed run resumes from there. Without --model, the responses in --responses
are scored. --backend openai asks a server, such as one of your own (`vllm serve MODEL`, then --base_url http://localhost:8000/v1).

Keys 1122 and 1129 ask for a "letter" that is a punctuation mark, which the published checker replaces by a random letter. Leave
them out (--exclude_keys 1122 1129) for a score without chance."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = CommandParser("eval ifeval", _USAGE, _ABOUT)
    parser.add_argument("--data", metavar="FILE", help="IFEval's input_data.jsonl (default: google/IFEval on the Hub)")
    parser.add_argument("--exclude_keys", metavar="KEY", type=int, nargs="+", default=[], help="prompts to leave out")
    add_file_arguments(parser)
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    options.responses = responses_file(options, "ifeval")
    request = model_request(options)
    prompts = load_prompts(options.data)
    kept = without(prompts, options.exclude_keys)
    score = load_scorer()
    counts = score_responses(prompts, kept, score, request, options)
    note = f"First line: {counts.prompts} of {len(prompts)} prompts, {counts.instructions} instructions."
    note += note_of(options.responses, questions_of(prompts))
    random_keys = [prompts[number]["key"] for number in kept if prompts[number]["key"] in RANDOM_KEYS]
    if random_keys:
        note += f" Keys {', '.join(map(str, random_keys))} are scored by chance (--exclude_keys leaves them out)."
    Console().print(ifeval_table(scored_name(options), counts.percentages(), note))


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
    verdicts, samples = [], []
    for number in track(kept, "Scoring", console=Console(stderr=True)):
        verdict = score(prompts[number], responses[number])
        verdicts.append(verdict)
        samples.append(_sample(prompts[number], responses[number], verdict))
    counts = Counts.of(verdicts)
    if options.samples:
        options.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
    return counts


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
