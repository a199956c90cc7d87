"""`trl-miso eval ifeval`: score responses to IFEval's prompts."""

from collections.abc import Sequence

from trl_miso.cli.eval_instructions import Benchmark, run
from trl_miso.evaluation.ifeval import RANDOM_KEYS, IFEvalPrompt, load_prompts, load_scorer
from trl_miso.evaluation.table import ifeval_table

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
    benchmark = Benchmark(
        name="ifeval",
        about=_ABOUT,
        data="IFEval's input_data.jsonl (default: google/IFEval on the Hub)",
        key=int,
        load_prompts=load_prompts,
        load_scorer=lambda _: load_scorer(),
        random_keys=_random_keys,
        table=ifeval_table,
    )
    run(benchmark, arguments)


def _random_keys(prompts: Sequence[IFEvalPrompt]) -> list[int]:
    return [prompt["key"] for prompt in prompts if prompt["key"] in RANDOM_KEYS]
