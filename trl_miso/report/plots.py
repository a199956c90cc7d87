"""The report's figures, drawn with matplotlib (the extra `plots`)."""

import textwrap
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # distinct for colour-blind readers too
_NAMES = {"output": "output", "base": "base\ninstruction", "earlier": "earlier\nturns", "rest": "markup,\nrest"}
COLUMNS = 110  # characters per line of the heat map
_MAX_LINES = 90  # of the heat map
_LINE_HEIGHT = 0.19  # inches
_DPI = 150
_FONT: dict[str, Any] = {"family": "DejaVu Sans Mono", "size": 9, "parse_math": False}

_Piece = tuple[int, int, str]  # line, column, text


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        ImportError: If it is not.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            "Got no package 'matplotlib', expected it for the report's figures. Fix: pip install 'trl-miso[plots]'."
        )


def draw(report: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Write the figures for which the report has data, as PNG files in `folder`.

    Returns:
        For each figure its `file`, its `title`, and `about`: what it shows.
    """
    models, row = report["models"], report["shown"]["row"]
    answers = f"mean over layers, heads and the tokens of the {'answers' if len(models) > 1 else 'answer'}"
    figures = []

    def add(file: str, title: str, about: str, figure: "Figure") -> None:
        figure.savefig(folder / file, dpi=_DPI)
        figures.append({"file": file, "title": title, "about": about})

    add("row.png", f"Row {row}, token by token", f"Attention of the answer; {answers}.", _heat_map(report))
    add("constraints.png", f"Row {row}, part by part", f"Attention of the answer; {answers}.", _row_bars(report))
    about = "Mean over rows, layers, heads and the tokens of the answers; the bars of a model sum to one."
    add("kinds.png", "Attention by part, all rows", about, _kinds(models))
    about = "Attention on all constraints of a row, per layer and head; mean over rows and the tokens of the answers."
    add("layers.png", "Constraints by layer and head", about, _layers(models))
    if any(model["relation"]["mass"]["constraints"] for model in models):
        about = "Each dot is the attention on one constraint, by whether the answer follows the constraint; the line is the mean."
        add("relation.png", "Constraints that are followed, and others", about, _relation(models))
    if any(model["dilution"] for model in models):
        about = (
            "The attention that output tokens keep on the output, with the first n contexts of each row. Dashed: by eq. 6 from the "
            "masses in the mixture, the share that one softmax (vanilla) would leave with these masses. Rows with fewer contexts are "
            "missing to the right."
        )
        add("dilution.png", "The output's share by number of contexts", about, _dilution(models))
    if len(models) > 1:
        about = "Each dot is one constraint: the attention on it in both models, for the same row. On the line nothing changed."
        add("compare.png", "Constraints, before and after", about, _before_after(models))
    return figures


def _figure(width: float, height: float, panels: int = 1) -> tuple["Figure", list[Any]]:
    """A figure of a size in inches, and its axes in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels, squeeze=True)))
    for axis in axes:
        axis.set_prop_cycle(color=_COLOURS)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _kinds(models: list[dict[str, Any]]) -> "Figure":
    figure, (axis,) = _figure(8, 3.4)
    kinds = [kind for kind in models[0]["kinds"] if any(model["kinds"][kind] for model in models)]
    height = 0.8 / len(models)
    for i, model in enumerate(models):
        values = [model["kinds"][kind] for kind in kinds]
        at = np.arange(len(kinds)) + (i - (len(models) - 1) / 2) * height
        bars = axis.bar(at, values, height * 0.95, label=_short(model["name"]))
        axis.bar_label(bars, [f"{100 * value:.1f}" for value in values], fontsize=8, padding=1)
    axis.set_xticks(range(len(kinds)), [_NAMES.get(kind, kind) for kind in kinds])
    axis.set(ylabel="share of attention", ylim=(0, None))
    axis.yaxis.set_major_formatter(_percent())
    if len(models) > 1:
        axis.legend(frameon=False)
    return figure


def _row_bars(report: dict[str, Any]) -> "Figure":
    """The shown row: one bar per part, labelled with the part's text."""
    models = report["models"]
    rows = [next(r for r in model["rows"] if r["row"] == report["shown"]["row"]) for model in models]
    parts = rows[0]["parts"]
    figure, (axis,) = _figure(9, 0.9 + 0.46 * len(parts))
    height = 0.8 / len(models)
    for i, (model, row) in enumerate(zip(models, rows, strict=True)):
        at = np.arange(len(parts)) + (i - (len(models) - 1) / 2) * height
        values = [part["mass"] for part in row["parts"]]
        bars = axis.barh(at, values, height * 0.95, label=_short(model["name"]))
        marks = [_mark(part["followed"]) for part in row["parts"]]
        labels = [f"{100 * v:.1f} %{mark}" for v, mark in zip(values, marks, strict=True)]
        axis.bar_label(bars, labels, fontsize=8, padding=2)
    axis.set_yticks(range(len(parts)), _labels(parts), fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(_percent())
    axis.set_xlim(0, 1.2 * max(part["mass"] for row in rows for part in row["parts"]))
    if len(models) > 1:
        axis.legend(frameon=False)
    return figure


def _layers(models: list[dict[str, Any]]) -> "Figure":
    figure, axes = _figure(1.5 + 4.2 * len(models), 3.6, len(models))
    grids = [np.array(model["layers"]["constraint"], dtype=float) for model in models]
    most = max(float(np.nanmax(grid)) for grid in grids) or 1.0
    for axis, model, grid in zip(axes, models, grids, strict=True):
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
        axis.set(title=_short(model["name"]), xlabel="head", ylabel="layer")
        for set_ticks, size in ((axis.set_xticks, grid.shape[1]), (axis.set_yticks, grid.shape[0])):
            numbers = range(0, size, max(1, size // 8))
            set_ticks(numbers, [str(number + 1) for number in numbers])
    figure.colorbar(image, ax=axes, format=_percent())
    return figure


def _relation(models: list[dict[str, Any]]) -> "Figure":
    figure, axes = _figure(1 + 3.6 * len(models), 3.6, len(models))
    for axis, model in zip(axes, models, strict=True):
        constraints = [p for row in model["rows"] for p in row["parts"] if p["followed"] is not None]
        generator = np.random.default_rng(0)
        for at, verdict in enumerate((True, False)):
            values = np.array([p["mass"] for p in constraints if p["followed"] is verdict])
            axis.plot(at + generator.uniform(-0.2, 0.2, len(values)), values, ".", alpha=0.5, color=_COLOURS[at])
            if len(values):
                axis.hlines(values.mean(), at - 0.3, at + 0.3, color="black")
        relation = model["relation"]["mass"]
        followed, others = relation["followed"], relation["constraints"] - relation["followed"]
        axis.set_xticks(range(2), [f"followed\nn = {followed}", f"not followed\nn = {others}"])
        auc = "too few to compare"
        if relation["auc"] is not None:
            auc = "AUC {:.2f} ({:.2f} to {:.2f})".format(*relation["auc"])
        axis.set_title(f"{_short(model['name'])}\n{auc}", fontsize=10)
        axis.set(xlim=(-0.6, 1.6), ylim=(0, None))
        axis.yaxis.set_major_formatter(_percent())
    axes[0].set_ylabel("share of attention")
    return figure


def _dilution(models: list[dict[str, Any]]) -> "Figure":
    figure, axes = _figure(1 + 4.2 * len(models), 3.6, len(models))
    shares = []
    for model in models:
        for line in model["dilution"]:
            shares += [share for name, share in line.items() if name not in ("contexts", "rows") and share is not None]
    top = 1.08 * max(shares)
    for axis, model in zip(axes, models, strict=True):
        lines = model["dilution"]
        numbers = [line["contexts"] for line in lines]
        for name, marker in (("uniform", "o-"), ("fid", "s:"), ("vanilla", "^-")):
            values = [np.nan if line[name] is None else line[name] for line in lines]
            # fid is often uniform's line: hollow and dotted, it shows both.
            size = {"markersize": 9, "markerfacecolor": "none"} if name == "fid" else {}
            axis.plot(numbers, values, marker, label=name, **size)
        axis.plot(numbers, [line["equation 6"] for line in lines], "k--", label="eq. 6")
        ticks = [f"{line['contexts']}\n({line['rows']})" for line in lines]
        axis.set_xticks(numbers, ticks, fontsize=8)
        axis.set(title=_short(model["name"]), xlabel="contexts (rows)", ylim=(0, top))
        axis.yaxis.set_major_formatter(_percent())
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("the output's share")
    axes[-1].legend(frameon=False)
    return figure


def _before_after(models: list[dict[str, Any]]) -> "Figure":
    figure, (axis,) = _figure(5, 4.6)
    first, second = (_constraint_masses(model) for model in models)
    common = [key for key in first if key in second]
    before, after = [first[key] for key in common], [second[key] for key in common]
    most = 1.05 * max([*before, *after, 1e-9])
    axis.plot([0, most], [0, most], color="grey", linewidth=1)
    axis.plot(before, after, ".", alpha=0.6)
    axis.set(xlim=(0, most), ylim=(0, most), aspect="equal")
    axis.set(xlabel=_short(models[0]["name"]), ylabel=_short(models[1]["name"]))
    axis.xaxis.set_major_formatter(_percent())
    axis.yaxis.set_major_formatter(_percent())
    return figure


def _constraint_masses(model: dict[str, Any]) -> dict[tuple[int, int], float]:
    """The mass of each constraint by (row, part)."""
    masses = {}
    for row in model["rows"]:
        for i, part in enumerate(row["parts"]):
            if part["kind"] == "constraint":
                masses[row["row"], i] = part["mass"]
    return masses


def _heat_map(report: dict[str, Any]) -> "Figure":
    """The prompt as text, each token on the colour of its mass; one panel per model, all on one scale."""
    shown, models = report["shown"], report["models"]
    placed, lines = wrap_tokens(shown["models"][0]["prompt"])
    shown_lines = min(lines, _MAX_LINES)
    figure, axes, height = _text_panels(len(models), shown_lines)
    most = _largest_in_instruction(shown)
    for axis, model, detail in zip(axes, models, shown["models"], strict=True):
        _paint_tokens(axis, placed, detail["layers"][0], most, shown_lines)
        for line, text in enumerate(_lines(placed)[:shown_lines]):
            axis.text(0, line + 0.5, _drawable(text), va="center", **_FONT)
        axis.set(xlim=(0, COLUMNS), ylim=(shown_lines, 0))
        axis.set_title(_short(model["name"]), fontsize=10)
        axis.axis("off")
    note = f"darkest: {100 * most:.2g} % of the attention or more"
    if lines > _MAX_LINES:
        note += f"; the first {_MAX_LINES} lines"
    figure.text(0.5, 0.12 / height, note, fontsize=9, ha="center")
    return figure


def _text_panels(panels: int, lines: int) -> tuple["Figure", list[Any], float]:
    """A figure with panels of `COLUMNS` x `lines` characters below each other, its axes, and its height in inches."""
    from matplotlib.figure import Figure

    text, title, note = _LINE_HEIGHT * lines, 0.4, 0.4  # heights in inches
    height = note + panels * (title + text)
    margins = {"left": 0, "right": 1, "bottom": note / height, "top": 1 - title / height, "hspace": title / text}
    figure = Figure(dpi=_DPI)
    # The width of a line depends on how the font is fitted to pixels: measure a line.
    ruler = figure.text(0, 0, "x" * COLUMNS, **_FONT)
    figure.set_size_inches(ruler.get_window_extent().width / _DPI, height)
    ruler.remove()
    return figure, list(figure.subplots(panels, 1, squeeze=False, gridspec_kw=margins)[:, 0]), height


def _largest_in_instruction(shown: dict[str, Any]) -> float:
    """The largest mass of a token of the instruction: markup often has more, and would hide all others."""
    kinds = [part["kind"] for part in shown["parts"]]
    masses = []
    for detail in shown["models"]:
        for mass, owner in zip(detail["layers"][0], detail["owners"], strict=True):
            if kinds[owner] in ("constraint", "base"):
                masses.append(mass)
    return max(masses, default=0) or 1.0


def _paint_tokens(axis: Any, placed: list[list[_Piece]], masses: list[float], most: float, lines: int) -> None:
    """Colour the places of the tokens by their masses; `most` and more is darkest."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes, values = [], []
    for pieces, mass in zip(placed, masses, strict=True):
        for line, column, text in pieces:
            if line < lines:
                boxes.append(Rectangle((column, line), len(text), 1))
                values.append(min(1.0, mass / most) ** 0.5)
    patches = PatchCollection(boxes, cmap="YlOrRd", linewidth=0)
    patches.set(array=np.array(values), clim=(0, 1.25))  # the darkest red of the map would hide the text
    axis.add_collection(patches)


def wrap_tokens(texts: list[str]) -> tuple[list[list[_Piece]], int]:
    """The pieces of each token, wrapped at `COLUMNS` and at line breaks, which are also shown; and the number of lines."""
    placed, line, column = [], 0, 0
    for text in texts:
        pieces: list[_Piece] = []
        for i, piece in enumerate(text.split("\n")):
            if i:
                pieces.append((line, column, "↵"))
                line, column = line + 1, 0
            while piece:
                if column + min(len(piece), 24) > COLUMNS:
                    line, column = line + 1, 0
                fits, piece = piece[: COLUMNS - column], piece[COLUMNS - column :]
                pieces.append((line, column, fits))
                column += len(fits)
        placed.append(pieces)
    return placed, line + 1


def _lines(placed: list[list[_Piece]]) -> list[str]:
    """The text of each line."""
    lines: dict[int, str] = {}
    for line, _, text in chain.from_iterable(placed):
        lines[line] = lines.get(line, "") + text
    return [lines.get(line, "") for line in range(max(lines, default=0) + 1)]


def _drawable(text: str) -> str:
    """The text with a box, one column wide, for each character that the font lacks."""
    glyphs = _glyphs()
    return "".join(char if ord(char) in glyphs and char.isprintable() else "□" for char in text.replace("\t", "⇥"))


@cache
def _glyphs() -> set[int]:
    """The code points of the font."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return set(get_font(findfont(FontProperties(family=_FONT["family"]))).get_charmap())


def _percent() -> Any:
    """Format of an axis of shares."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda share, _: f"{100 * share:g} %")


def _labels(parts: list[dict[str, Any]]) -> list[str]:
    """The beginning of each part's text after its kind, or after its number if it is a constraint."""
    labels, number = [], 0
    for part in parts:
        text = _drawable(textwrap.shorten(part["text"], 48, placeholder=" …"))
        kind = _NAMES.get(part["kind"], part["kind"]).replace("\n", " ")
        if part["kind"] == "constraint":
            number += 1
            labels.append(f"{number}. {text}")
        elif text:
            labels.append(f"{kind}: {text}")
        else:
            labels.append(kind)
    return labels


def _mark(followed: bool | None) -> str:
    return {None: "", True: "  ✓", False: "  ✗"}[followed]


def _short(name: str) -> str:
    """The end of a model's name, with `$` escaped so that it begins no formula."""
    return _drawable(name[-40:]).replace("$", r"\$")
