"""Score tables of IFEval and IFEval-Flatten, above the paper's rows, and of IFBench and Multi-IF."""

from collections.abc import Sequence
from statistics import fmean

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

COLUMNS = ("[S]P", "[S]I", "[L]P", "[L]I")

# Table 1 of arXiv 2505.11922, as printed: method, base model, COLUMNS, Avg.
PAPER: tuple[tuple[str, str, tuple[float, float, float, float], float], ...] = (
    ("Vicuna-v1.5*", "Llama2-13B", (43.1, 53.6, 46.6, 58.0), 50.3),
    ("WizardLM-v1.2*", "Llama2-13B", (43.6, 54.4, 48.4, 59.1), 51.4),
    ("Conifer-SFT*", "Llama2-13B", (42.9, 53.0, 47.5, 57.4), 50.2),
    ("Llama3-8B*", "Llama3-8B", (25.7, 36.8, 28.1, 35.1), 31.4),
    ("Mistral-7B*", "Mistral-7B", (18.5, 30.8, 19.6, 31.9), 25.2),
    ("Zephyr-beta*", "Mistral-7B", (32.0, 46.8, 44.9, 58.0), 45.4),
    ("SFT", "Llama3-8B", (40.1, 51.9, 44.7, 55.6), 48.1),
    ("MISO-para", "Llama3-8B", (44.5, 54.7, 49.5, 59.5), 52.1),
    ("MISO-succ", "Llama3-8B", (44.7, 54.9, 47.9, 57.9), 51.4),
    ("SFT", "Mistral-7B", (38.8, 49.4, 41.8, 52.5), 45.5),
    ("MISO-para", "Mistral-7B", (42.9, 54.1, 46.0, 57.7), 50.2),
    ("MISO-succ", "Mistral-7B", (42.9, 53.5, 47.0, 58.2), 50.4),
)
_CITED = (
    "Below the first line: the paper's rows, Table 1 of arXiv 2505.11922 (all 541 prompts; * quoted there from Qi et al. 2024). "
    "SFT and MISO are fine-tuned on Crab."
)

# IFEval-Flatten in the same table: method, base model, FLATTEN_COLUMNS, Avg.
FLATTEN_COLUMNS = ("[S]I", "[L]I")
FLATTEN_PAPER: tuple[tuple[str, str, tuple[float, float], float], ...] = (
    ("SFT", "Llama3-8B", (52.5, 56.5), 54.5),
    ("MISO-para", "Llama3-8B", (58.4, 62.1), 60.3),
    ("MISO-succ", "Llama3-8B", (55.4, 58.4), 56.9),
    ("SFT", "Mistral-7B", (54.0, 57.9), 56.0),
    ("MISO-para", "Mistral-7B", (57.6, 61.1), 59.4),
    ("MISO-succ", "Mistral-7B", (56.1, 61.1), 58.6),
)
_FLATTEN_CITED = (
    "Below the first line: the paper's rows, Table 1 of arXiv 2505.11922, on its authors' prompts; fine-tuned on Crab."
)

_IFBENCH_CITED = "IFBench's paper (arXiv 2507.02833) generally reports [L]P, the prompt-level loose accuracy."


def ifeval_table(name: str, percentages: Sequence[float], note: str) -> Table:
    """Lay out one row of `percentages` (in the order of `COLUMNS`) above the paper's rows; `note` describes that row."""
    return _table("IFEval (%)", COLUMNS, name, percentages, PAPER, f"{note} {_CITED}")


def flatten_table(name: str, percentages: Sequence[float], note: str) -> Table:
    """As `ifeval_table`, with `percentages` in the order of `FLATTEN_COLUMNS`."""
    return _table("IFEval-Flatten (%)", FLATTEN_COLUMNS, name, percentages, FLATTEN_PAPER, f"{note} {_FLATTEN_CITED}")


def ifbench_table(name: str, percentages: Sequence[float], note: str) -> Table:
    """Lay out one row of `percentages` (in the order of `COLUMNS`). The paper of MISO has no rows of IFBench."""
    return _table("IFBench (%)", COLUMNS, name, percentages, (), f"{note} {_IFBENCH_CITED}")


def multi_if_table(name: str, percentages: Sequence[Sequence[float]], note: str) -> Table:
    """Lay out one row of `percentages` (in the order of `COLUMNS`) per turn. The paper of MISO has no rows of Multi-IF."""
    table = Table(title="Multi-IF (%)", box=SIMPLE, caption=Text(note))
    table.add_column("model")
    for column in ("turn", *COLUMNS, "Avg."):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for turn, accuracies in enumerate(percentages, start=1):
        table.add_row(Text(name), str(turn), *_cells((*accuracies, fmean(accuracies))))
    return table


def _table(
    title: str,
    columns: Sequence[str],
    name: str,
    percentages: Sequence[float],
    paper: Sequence[tuple[str, str, Sequence[float], float]],
    caption: str,
) -> Table:
    # Text, since rich reads "[S]" in a string as a style.
    table = Table(title=title, box=SIMPLE, caption=Text(caption))
    table.add_column("model")
    if paper:
        table.add_column("base model")
    for column in (*columns, "Avg."):
        table.add_column(Text(column), justify="right", no_wrap=True)
    names = [Text(name), Text("")] if paper else [Text(name)]
    table.add_row(*names, *_cells((*percentages, fmean(percentages))), style="bold", end_section=True)
    for method, base, accuracies, average in paper:
        table.add_row(method, base, *_cells((*accuracies, average)))
    return table


def _cells(values: Sequence[float]) -> list[str]:
    return [f"{value:.1f}" for value in values]
