"""Draw the pictures of the README and of the site into docs/images.

    python docs/draw.py                  # all of them
    python docs/draw.py method verify    # some of: method, verify, eval, preview, report

Needs `pip install -e '.[plots]'`; preview and report are photographed by a headless Chromium and are left as they are where none is
installed. The report trains the toy model of examples/train_crab.py first, which takes a minute or two.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
BROWSERS = ("chromium", "google-chrome", "chrome")

# The worked example of the README.
BASE = "Recommend a novel."
CONSTRAINTS = ("Name its author.", "Use at most 15 words.", "End with a question.")
OUTPUT = ("Try Middlemarch by", "George Eliot: small-town lives,", "immense sympathy.", "Shall I suggest another?")

# Ink, faint ink, then the colors of the base instruction, the constraints and the output.
THEMES = {
    "light": {
        "ink": "#1f2328",
        "faint": "#59636e",
        "line": "#c5ccd3",
        "base": ("#dbeafe", "#1d4ed8"),
        "constraints": (("#fde7d3", "#b45309"), ("#d9f2e3", "#15803d"), ("#ece2fb", "#7c3aed")),
        "output": ("#fbdfe6", "#be123c"),
        "ghost": "#f1f3f5",
    },
    "dark": {
        "ink": "#e6edf3",
        "faint": "#9aa4af",
        "line": "#3d444d",
        "base": ("#172f57", "#9cc4ff"),
        "constraints": (("#4a2c0d", "#f6b26b"), ("#123b24", "#7ee2a0"), ("#35245a", "#c9b0ff")),
        "output": ("#54182a", "#ff9db3"),
        "ghost": "#1c2128",
    },
}


def method() -> None:
    """The method, for a light and for a dark page."""
    for name, theme in THEMES.items():
        # The same bytes from the same code, so that a commit shows real changes only.
        matplotlib.rcParams["svg.hashsalt"] = "trl-miso"
        figure = Figure(figsize=(11.2, 4.5))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 112), ylim=(2, 47))
        axes.axis("off")
        _method(axes, theme)
        figure.savefig(IMAGES / f"method-{name}.svg", transparent=True, metadata={"Date": None})


def _method(axes: Axes, theme: dict) -> None:
    ink, faint = theme["ink"], theme["faint"]
    _title(axes, 14.7, "one instruction", theme)
    _title(axes, 55, "its contexts, each read by itself", theme)
    _title(axes, 100.7, "one output", theme)

    # Left: the instruction.
    axes.add_patch(_box(1, 14.1, 27.5, 21.4, "none", theme["line"]))
    colors = [theme["base"], *theme["constraints"]]
    for row, (text, color) in enumerate(zip((BASE, *CONSTRAINTS), colors, strict=True)):
        _chip(axes, 2.8, 30.4 - 4.9 * row, 23.9, text, color)
    _arrow(axes, 29.4, 32.6, faint)

    # Middle: the contexts. The prefix that they share is drawn solid once and dashed where it is reused.
    contexts = (
        ("full", (0, 1, 2)),
        ("constraint 1", (0,)),
        ("constraint 2", (1,)),
        ("constraint 3", (2,)),
        ("bare", ()),
    )
    for row, (label, parts) in enumerate(contexts):
        y = 37.2 - 7.1 * row
        axes.add_patch(_box(33.5, y - 1.1, 43.9, 5.6, "none", theme["line"]))
        axes.text(34.5, y + 1.62, label, color=faint, fontsize=8.6, va="center")
        prefix = (theme["ghost"], faint) if row else theme["base"]
        _chip(axes, 42.3, y, 14.2, BASE, prefix, dashed=row > 0)
        width = 17 / max(1, len(parts)) - 0.3
        for place, part in enumerate(parts):
            text = CONSTRAINTS[part] if len(parts) == 1 else str(part + 1)
            _chip(axes, 57 + place * (width + 0.4), y, width, text, theme["constraints"][part])
        # The output attends to the context, with its weight.
        axes.text(75.6, y + 1.7, f"$w_{row + 1}$", color=ink, fontsize=11, ha="center", va="center")
        axes.plot((77.4, 83.4), (y + 1.7, 24.7), color=theme["output"][1], linewidth=1.3, alpha=0.8)

    # Right: the weighted sum, and the output.
    axes.add_patch(_box(83, 22.4, 4.6, 4.6, "none", theme["output"][1], radius=2.2))
    axes.text(85.3, 24.55, r"$\Sigma$", color=theme["output"][1], fontsize=15, ha="center", va="center")
    _arrow(axes, 88, 90, theme["output"][1])
    axes.add_patch(_box(90.2, 17.2, 21, 14.8, theme["output"][0], theme["output"][1]))
    for row, text in enumerate(OUTPUT):
        axes.text(100.7, 29.4 - 3.2 * row, text, color=theme["output"][1], fontsize=8.6, ha="center", va="center")

    axes.add_patch(_box(1, 9.1, 2.2, 1.9, *theme["base"], radius=0.4))
    axes.text(4.2, 10, "common prefix, computed once", color=faint, fontsize=8.6, va="center")
    axes.add_patch(_box(1, 5.7, 2.2, 1.9, theme["ghost"], faint, dashed=True, radius=0.4))
    axes.text(4.2, 6.6, "the same tokens, reused", color=faint, fontsize=8.6, va="center")
    formula = r"$\mathrm{out}=\sum_i w_i\,\mathrm{softmax}\left(Q\,[K_i,K_{\mathrm{out}}]^{\top}/\sqrt{d}\right)[V_i,V_{\mathrm{out}}]$"
    axes.text(96.6, 11, formula, color=ink, fontsize=9.2, ha="center", va="center")
    axes.text(96.6, 7, "in every attention layer and head (eq. 3)", color=faint, fontsize=8.6, ha="center", va="center")


def _arrow(axes: Axes, start: float, end: float, color: str) -> None:
    axes.annotate("", (end, 24.7), (start, 24.7), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4})


def _title(axes: Axes, x: float, text: str, theme: dict) -> None:
    axes.text(x, 45, text, color=theme["ink"], fontsize=11.5, weight="bold", ha="center", va="center")


def _chip(
    axes: Axes, x: float, y: float, width: float, text: str, colors: tuple[str, str], dashed: bool = False
) -> None:
    """A piece of text in a colored box."""
    axes.add_patch(_box(x, y, width, 3.4, *colors, dashed=dashed, radius=0.7))
    axes.text(x + width / 2, y + 1.62, text, color=colors[1], fontsize=9, ha="center", va="center")


def _box(
    x: float, y: float, width: float, height: float, face: str, edge: str, dashed: bool = False, radius: float = 1.0
) -> FancyBboxPatch:
    return FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle=f"round,pad=0,rounding_size={radius}",
        facecolor=face,
        edgecolor=edge,
        linewidth=1.0,
        linestyle=(0, (3, 2)) if dashed else "solid",
    )


def verify() -> None:
    """`trl-miso verify` on generated rows and the toy model, as a terminal shows it."""
    output = _command("verify", env={"FORCE_COLOR": "1", "COLUMNS": "80"})
    # DeepSpeed, where it is installed, logs to stdout, each line with its date.
    lines = [line for line in output.splitlines() if not line.startswith("[20")]
    _terminal("verify", "trl-miso verify", Text.from_ansi("\n".join(lines)), 80)


def eval_() -> None:
    """The table of `trl-miso eval ifeval`, with a first line of made-up numbers that says so."""
    from trl_miso.evaluation.table import ifeval_table

    note = "First line: made-up numbers, to show the table."
    table = ifeval_table("your model (made-up)", (40.0, 50.0, 45.0, 55.0), note)
    _terminal("eval", "trl-miso eval ifeval --model MODEL", table, 78)


def preview() -> None:
    """The page of `trl-miso preview` on generated rows."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "preview.html")
        _command("preview", "--html", str(page))
        # Leave the statistics out, and point at a token of the output.
        script = """
            while (!main.firstElementChild.matches(".bar")) main.firstElementChild.remove();
            all.forEach((row) => fill(row.lastChild));
            point(document.querySelectorAll(".row .output .t")[8]);
        """
        _photograph("preview", page, script, 1240, 640)


def report() -> None:
    """The page of `trl-miso report` on the toy model before and after training."""
    with tempfile.TemporaryDirectory() as folder:
        example = [sys.executable, str(DOCS.parent / "examples/train_crab.py")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(DOCS.parent)}
        for name, options in (
            ("before", ["--max_steps", "1", "--learning_rate", "0"]),
            ("after", ["--max_steps", "60"]),
        ):
            subprocess.run([*example, "--output_dir", name, *options], check=True, cwd=folder, env=environment)
        models = ["--model", "before", "--compare", "after"]
        _command("report", *models, "--num_rows", "25", "--use_cpu", "--output_dir", "report", cwd=folder)
        # Two of the tables, then the row with its colored tokens.
        script = "[...document.querySelector('.panels').children].slice(2).forEach((panel) => panel.remove());"
        _photograph("report", Path(folder, "report/report.html"), script, 1240, 1020)


def _command(*arguments: str, env: dict[str, str] | None = None, cwd: str | None = None) -> str:
    """Run `trl-miso` with this Python, and return what it printed."""
    code = "from trl_miso.cli.main import main; main()"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(DOCS.parent)} | (env or {})
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True).stdout


def _terminal(name: str, title: str, content: object, width: int) -> None:
    """Save what a terminal of `width` columns shows as a picture."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        console.print(content)
        console.save_svg(str(IMAGES / f"{name}.svg"), title=title, theme=MONOKAI, unique_id=f"trl-miso-{name}")


def _photograph(name: str, page: Path, script: str, width: int, height: int) -> None:
    """Save a page as a headless Chromium shows it after `script`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"{name}: no {' or '.join(BROWSERS)} to photograph the page with; its picture is left as it is")
        return
    photographed = page.with_name("photographed.html")
    photographed.write_text(f"{page.read_text(encoding='utf-8')}<script>{script}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--hide-scrollbars",
        "--virtual-time-budget=2000",
        f"--window-size={width},{height}",
        f"--screenshot={IMAGES / name}.png",
    ]
    subprocess.run([browser, *flags, photographed.as_uri()], check=True, stderr=subprocess.DEVNULL)


PICTURES: dict[str, Callable[[], None]] = {
    "method": method,
    "verify": verify,
    "eval": eval_,
    "preview": preview,
    "report": report,
}

if __name__ == "__main__":
    for picture in sys.argv[1:] or PICTURES:
        PICTURES[picture]()
