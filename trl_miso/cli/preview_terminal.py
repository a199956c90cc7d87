"""Print a preview in a terminal: the statistics as tables, each row as panels of coloured tokens.

Colour is never the only sign. A segment begins with its number, tokens with loss are underlined, cut tokens are struck through.
Output without styles, as in a file, marks them by `[loss]` and `[/loss]`, `[cut]` and `[/cut]`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_COLOURS = ("bright_blue", "yellow", "magenta", "cyan", "bright_yellow", "bright_magenta", "bright_cyan")
_LOSS, _CUT = "bold underline green", "strike dim red"
# Control characters move the cursor or recolour the screen, direction overrides reorder the line: shown by marks, never printed.
_UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
# Longer segments are shown without their middle: segments shown before (with _EDGE tokens at each end), segments shown first.
_SHARED, _EDGE, _LONG = 16, 6, 400


def print_preview(preview: dict[str, Any], console: Console) -> None:
    """Print the statistics of a preview, then its rows: contexts, output, tokens with loss, cut tokens, dropped rows."""
    _Printer(console).preview(preview)


class _Printer:
    def __init__(self, console: Console) -> None:
        self.console = console
        utf = console.encoding.startswith("utf")
        self.dot, self.block, self.newline = (" · ", "█", "↵\n") if utf else (" - ", "#", "\\n\n")

    def preview(self, preview: dict[str, Any]) -> None:
        statistics = preview["statistics"]
        read = f"{'' if statistics['complete'] else 'only the first '}{_count(statistics['rows'], 'row')} read"
        facts = (statistics["model"], f"mode {statistics['mode']}", read)
        self.console.print(self._facts(statistics["dataset"], *facts))
        self.console.print(Columns(list(self._tables(statistics)), padding=(1, 4)))
        styled = [("underlined: with loss", _LOSS), ("struck: cut at max_length", _CUT)]
        legend = [("[n]: segment n begins", ""), ("dim: computed once, above", "dim")]
        legend += styled if self.console.color_system else []
        self.console.print()
        self.console.print(Text("   ").join(Text(text, style) for text, style in legend))
        for row in preview["rows"]:
            self._row(row)

    def visible(self, text: str) -> str:
        """The text with marks for invisible characters, and escapes for those that the terminal's encoding lacks."""
        marked = _UNSEEN.sub(lambda match: _mark(match[0]), text)
        encoding = self.console.encoding
        return marked.encode(encoding, "backslashreplace").decode(encoding)

    def _tables(self, statistics: dict[str, Any]) -> Iterator[Table]:
        """The tables of the statistics; those without data are left out."""
        tokens, cut, lengths = statistics["tokens"], statistics["cut"], statistics["lengths"]
        dropped, bins, cost = statistics["dropped"], statistics["bins"], statistics["cost"]
        statuses = [(f"  status {status}", n) for status, n in statistics["statuses"].items()]
        modes = [(f"  {mode}", n) for mode, n in statistics["modes"].items()]
        rows_read, examples = ("rows read", statistics["rows"]), ("examples", statistics["examples"])
        yield self._table("rows", rows_read, *statuses, examples, *modes)
        yield self._table(
            "tokens",
            ("unique", tokens["unique"]),
            ("if every context had a copy", tokens["unshared"]),
            ("saved by sharing", f"{tokens['saved']:.1%}"),
            ("with loss", tokens["labelled"]),
            (f"cut from {_count(cut['rows'], 'output')}", cut["tokens"]),
        )
        contexts = sorted((int(n), examples) for n, examples in statistics["contexts_per_example"].items())
        most = max((examples for _, examples in contexts), default=1)
        bars = ((f"{n:>3} {self.block * -(-12 * examples // most):<12}", examples) for n, examples in contexts)
        yield self._table("contexts per example", *bars)
        names = {0: "shortest", 50: "median", 100: "longest"}
        columns = (lengths[name] for name in ("unique_tokens", "longest_context", "output"))
        percentiles = ((names.get(p, f"{p} %"), *ns) for p, *ns in zip(lengths["percentiles"], *columns, strict=True))
        yield self._table("lengths", ("", "unique tokens", "longest context", "output"), *percentiles)
        if bins:
            rows = {
                "bins": bins["bins"],
                "filled": f"{bins['filled']:.1%}",
                "examples per bin": bins["examples_per_bin"],
            }
            yield self._table(f"packing to {bins['max_length']:,} tokens", *rows.items())
        if cost:
            rows = {"tokens": "tokens", "score_pairs": "attention scores", "flops": f"compute ({cost['model']})"}
            costs = ((name, f"x {cost[key]:.2f}") for key, name in rows.items())
            yield self._table("estimated cost, plain SFT = 1", *costs)
        if dropped:
            reasons = ((reason, counts["rows"], str(counts["first_row"])) for reason, counts in dropped.items())
            yield self._table("dropped", ("reason", "rows", "first row"), *reasons, style="red")

    def _table(self, title: str, *rows: tuple[Any, ...], style: str = "") -> Table:
        table = Table(title=title, title_justify="left", title_style=f"bold {style}", box=None, show_header=False)
        for i in range(max(map(len, rows), default=0)):
            table.add_column(justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(self.visible(cell) if isinstance(cell, str) else f"{cell:,}") for cell in row))
        return table

    def _row(self, row: dict[str, Any]) -> None:
        paths = [_path(row["segments"], context["segment"]) for context in row["contexts"]]
        facts = [row["mode"], row["status"]]
        if not row["dropped"]:
            facts += [_count(max(1, len(paths)), "context"), _count(len(row["ids"]), "unique token")]
            if repeated := _repeated_tokens(row, paths):
                facts.append(f"{_count(repeated, 'repeated token')} saved")
            facts.append(f"{_loss(row['labels'])} with loss")
        self.console.print()
        self.console.print(self._facts(f"row {row['index']}", *facts))
        if row["dropped"]:
            text = Text.assemble((f"dropped: {self.visible(row['dropped'])}\n", "bold red"), self.visible(row["raw"]))
            self._panel(text, "red")
            return
        begins = list(accumulate((segment["length"] for segment in row["segments"]), initial=0))
        self._contexts(row, begins, paths)
        self._output(row, begins)

    def _contexts(self, row: dict[str, Any], begins: list[int], paths: list[list[int]]) -> None:
        """One panel per context; segments that an earlier context showed are shortened."""
        output = row["segments"][-1]
        shown_in: dict[int, int] = {}  # segment -> the last context that showed it
        for c, (context, path) in enumerate(zip(row["contexts"], paths, strict=True), start=1):
            first = row["segments"][path[0]]["start"]
            length = sum(row["segments"][s]["length"] for s in path)
            offset = f" (offset {context['offset']})" if context["offset"] else ""
            title = (f"context {c}", f"weight {context['weight']:.3g}", _count(length, "token"), _span(first, length))
            shared = [s for s in path if s in shown_in]
            text = Text()
            if shared:
                text = self._shared(row, begins, shared, shown_in[shared[-1]])
            for s in path[len(shared) :]:
                text.append_text(self._segment(row, begins, s, _COLOURS[s % len(_COLOURS)]))
                shown_in[s] = c
            self._panel(text, "dim", *title, f"output from {output['start'] + context['offset']}{offset}")

    def _output(self, row: dict[str, Any], begins: list[int]) -> None:
        """The panel of the output, or of the whole example if it is one run."""
        output = row["segments"][-1]
        text = self._segment(row, begins, len(row["segments"]) - 1, "")
        if row["cut"]:
            text.append_text(self._tokens(row["cut"], [_CUT] * len(row["cut"]), _LONG // 4, 0))
            text.append(f" [{_count(len(row['cut']), 'token')} cut at max_length]", "red")
        name = "output" if row["contexts"] else "one run, context and output"
        facts = [_count(output["length"], "token"), f"{_loss(row['labels'])} with loss"]
        self._panel(text, "green", name, *facts, _span(output["start"], output["length"]))

    def _facts(self, first: str, *others: str) -> Text:
        """A line of facts, the first in bold; empty ones are left out."""
        rest = "".join(self.dot + self.visible(fact) for fact in others if fact)
        return Text().append(self.visible(first), "bold").append(rest)

    def _panel(self, text: Text, style: str, *title: str) -> None:
        # Above the panel: a narrow terminal would cut a panel's own title.
        if title:
            self.console.print(self._facts(*title))
        self.console.print(Panel(text, box=box.ROUNDED, border_style=style))

    def _segment(self, row: dict[str, Any], begins: list[int], s: int, style: str) -> Text:
        """The number and the tokens of a segment."""
        span = slice(begins[s], begins[s + 1])
        styles = [style if label == -100 else _LOSS for label in row["labels"][span]]
        number = Text().append(f"[{s}]", f"{style} reverse")
        return number.append_text(self._tokens(row["texts"][span], styles, _LONG * 3 // 4, _LONG // 4))

    def _shared(self, row: dict[str, Any], begins: list[int], path: list[int], context: int) -> Text:
        """The beginning of a context that an earlier context showed, without its middle if it is long."""
        texts = [text for s in path for text in row["texts"][begins[s] : begins[s + 1]]]
        head = tail = _EDGE if len(texts) > _SHARED else len(texts)
        text = Text().append("".join(f"[{s}]" for s in path), "dim")
        text.append_text(self._tokens(texts, ["dim"] * len(texts), head, tail, note=False))
        return text.append(f" (shared with context {context}: {_count(len(texts), 'token')}) ", "dim italic")

    def _tokens(self, texts: Sequence[str], styles: Sequence[str], head: int, tail: int, note: bool = True) -> Text:
        """Styled tokens; of more than `head + tail` tokens, the middle is left out."""
        text, left_out, at = Text(), len(texts) - head - tail, 0
        for style, run in groupby(styles):
            name = {_LOSS: "loss", _CUT: "cut"}.get(style, "") if self.console.color_system is None else ""
            text.append(f"[{name}]" if name else "")
            for _ in run:
                if left_out <= 0 or at < head or at >= len(texts) - tail:
                    text.append(self.newline.join(self.visible(line) for line in texts[at].split("\n")), style)
                elif at == head:
                    text.append(f" ... {_count(left_out, 'token')} more ... " if note else " ... ", "dim")
                at += 1
            text.append(f"[/{name}]" if name else "")
        return text


def _mark(char: str) -> str:
    """The picture of a control character (a small ESC for ESC), or a character's number."""
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"<{code:02X}>"


def _path(segments: list[dict[str, int]], leaf: int) -> list[int]:
    """The segments from a root to a leaf."""
    path = [leaf]
    while (parent := segments[path[-1]]["parent"]) >= 0:
        path.append(parent)
    return path[::-1]


def _repeated_tokens(row: dict[str, Any], paths: list[list[int]]) -> int:
    """Tokens of all contexts in excess of the tokens that are stored for them."""
    if not paths:
        return 0
    total = sum(row["segments"][s]["length"] for path in paths for s in path)
    return total - (len(row["ids"]) - row["segments"][-1]["length"])


def _loss(labels: list[int]) -> str:
    return f"{sum(label != -100 for label in labels):,}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _span(start: int, length: int) -> str:
    return f"positions {start}-{start + length - 1}"
