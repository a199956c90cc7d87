"""`trl-miso eval multi_if`: score responses to the turns of Multi-IF's conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console

from trl_miso.cli.eval_arguments import add_model_arguments, model_request, responses_file, scored_name
from trl_miso.cli.eval_instructions import add_file_arguments, score_answered, write_scores
from trl_miso.cli.parser import CommandParser
from trl_miso.evaluation.ifeval import Counts
from trl_miso.evaluation.multi_if import answer_turns, load_conversations, load_scorer
from trl_miso.evaluation.table import multi_if_table

_USAGE = (
    "[--model MODEL [--backend transformers|vllm|openai] ...] [--responses FILE] [--data FILE] [--json FILE] "
    "[--samples FILE]"
)
_ABOUT = """\
Score responses to Multi-IF's English conversations with lm-eval's checkers, and print the accuracies of each turn: [S] strict,
[L] loose, P prompts (every instruction followed), I instructions. Avg., the mean of the four, is what Multi-IF reports. A turn's
instructions include those of the turns before. Needs pip install 'trl-miso[eval]' and NLTK's punkt_tab.

With --model, the model is asked turn by turn by standard inference (its chat template, greedy); it sees its own earlier responses.
They are kept in three files: FILE for turn 1 (--responses, default: multi_if-MODEL.jsonl), FILE.turn2 and FILE.turn3. A killed run
resumes from there. Without --model, the responses in these files are scored. Turn 3 needs room for three responses of up to
--max_new_tokens tokens. --backend openai asks a server (`vllm serve MODEL`, then --base_url http://localhost:8000/v1)."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = CommandParser("eval multi_if", _USAGE, _ABOUT)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="csv, parquet or jsonl with the columns of Multi-IF (default: facebook/Multi-IF on the Hub)",
    )
    add_file_arguments(parser)
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    options.responses = responses_file(options, "multi_if")
    request = model_request(options)
    conversations, left_out = load_conversations(options.data)
    score = load_scorer(conversations)  # before the model is asked, which may take hours: it finds what is missing
    answered, note = answer_turns(conversations, options.responses, request)
    counts: list[Counts] = []
    samples: list[dict[str, object]] = []
    for turn, prompts_and_responses in enumerate(answered, start=1):
        turn_counts, turn_samples = score_answered(prompts_and_responses, score)
        counts.append(turn_counts)
        samples += [{"turn": turn, **sample} for sample in turn_samples]
    report = {f"turn_{turn}": asdict(turn_counts) for turn, turn_counts in enumerate(counts, start=1)}
    write_scores(report | {"left_out": left_out}, samples, options)
    percentages = [turn_counts.percentages() for turn_counts in counts]
    Console().print(multi_if_table(scored_name(options), percentages, _note(counts, left_out) + note))


def _note(counts: Sequence[Counts], left_out: Mapping[str, int]) -> str:
    """Say how many conversations are scored, and which are left out."""
    reached = ", ".join(f"{turn_counts.prompts:,}" for turn_counts in counts)
    note = f"By turn {reached} of {counts[0].prompts + sum(left_out.values()):,} conversations."
    if left_out:
        languages = ", ".join(f"{number:,} {language}" for language, number in sorted(left_out.items()))
        note += f" Left out, since the checkers are made for English: {languages}."
    return f"{note} Multi-IF reports Avg."
