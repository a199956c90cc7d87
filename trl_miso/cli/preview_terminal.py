"""Print a preview in a terminal: the statistics as tables, each row as panels of coloured tokens.

Colour is never the only sign. A segment begins with its number, tokens with loss are underlined, cut tokens are struck through.
Output without styles, as in a file, marks them by `[loss]` and `[/loss]`, `[cut]` and `[/cut]`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
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
    """Print the statistics of a preview, then its rows: answers with their contexts, tokens with loss and cut, dropped rows."""
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
        self.console.print(Text(self.visible(f"train_turns {statistics['train_turns']}")))
        for warning in statistics["warnings"]:
            self.console.print(Text(self.visible(f"Warning: {warning}"), "yellow"))
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
        several = (
            (f"  of {_count(int(n), 'answer')}", examples) for n, examples in statistics["answers_per_example"].items()
        )
        answers = (
            [("answers", statistics["answers"]), *several] if statistics["answers"] > statistics["examples"] else []
        )
        yield self._table("rows", rows_read, *statuses, examples, *modes, *answers)
        yield self._table(
            "tokens",
            ("unique", tokens["unique"]),
            ("if every context had a copy", tokens["unshared"]),
            ("saved by sharing", f"{tokens['saved']:.1%}"),
            ("with loss", tokens["labelled"]),
            (f"cut from {_count(cut['rows'], 'row')}", cut["tokens"]),
        )
        contexts = sorted((int(n), answers) for n, answers in statistics["contexts_per_answer"].items())
        most = max((answers for _, answers in contexts), default=1)
        bars = ((f"{n:>3} {self.block * -(-12 * answers // most):<12}", answers) for n, answers in contexts)
        yield self._table("contexts per answer", *bars)
        names = {0: "shortest", 50: "median", 100: "longest"}
        kinds = ("unique_tokens", "longest_path", "longest_context", "output")
        columns = (lengths[kind] for kind in kinds)
        percentiles = ((names.get(p, f"{p} %"), *ns) for p, *ns in zip(lengths["percentiles"], *columns, strict=True))
        yield self._table("lengths", ("", *(kind.replace("_", " ") for kind in kinds)), *percentiles)
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
        for title, found, style in (("dropped", dropped, "red"), ("notes", statistics["notes"], "yellow")):
            if found:
                reasons = ((reason, counts["rows"], str(counts["first_row"])) for reason, counts in found.items())
                yield self._table(title, ("reason", "rows", "first row"), *reasons, style=style)

    def _table(self, title: str, *rows: tuple[Any, ...], style: str = "") -> Table:
        table = Table(title=title, title_justify="left", title_style=f"bold {style}", box=None, show_header=False)
        for i in range(max(map(len, rows), default=0)):
            table.add_column(justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(self.visible(cell) if isinstance(cell, str) else f"{cell:,}") for cell in row))
        return table

    def _row(self, row: dict[str, Any]) -> None:
        answers = row["answers"]
        facts = [row["mode"], row["status"]]
        if not row["dropped"]:
            contexts = sum(len(answer["contexts"]) for answer in answers)
            facts.append(_count(len(answers), "answer") if len(answers) > 1 else "")
            facts.append(_count(max(1, contexts), "context") if contexts or len(answers) == 1 else "")
            facts.append(_count(len(row["ids"]), "unique token"))
            facts.append(f"{_count(row['saved'], 'repeated token')} saved" if row["saved"] else "")
            facts.append(f"{_loss(row['labels'])} with loss")
            facts.append(f"{_count(row['cut'], 'token')} cut" if row["cut"] else "")
        self.console.print()
        self.console.print(self._facts(f"row {row['index']}", *facts))
        for note in row["notes"]:
            self.console.print(Text(self.visible(f"Note: {note}"), "yellow"))
        if row["dropped"]:
            text = Text.assemble((f"dropped: {self.visible(row['dropped'])}\n", "bold red"), self.visible(row["raw"]))
            self._panel(text, "red")
            return
        shown: list[str] = [""] * len(row["ids"])  # for each token the name of the panel that showed it
        for number, answer in enumerate(answers, start=1):
            name = f"answer {number}" if len(answers) > 1 else ""
            if answer["contexts"]:
                self._contexts(row, answer, name, shown)
                self._output(row, answer, name or "output")
            else:
                self._run(row, answer, name, shown)

    def _contexts(self, row: dict[str, Any], answer: dict[str, Any], name: str, shown: list[str]) -> None:
        """One panel per context of an output; tokens that an earlier panel showed are shortened."""
        output = row["segments"][answer["segment"]]
        for context in answer["contexts"]:
            path = _path(row["segments"], context["segment"])
            first = row["segments"][path[0]]["start"]
            length = sum(row["segments"][s]["length"] for s in path)
            offset = f" (offset {context['offset']})" if context["offset"] else ""
            panel = f"{name}, {context['name']}" if name else context["name"]
            title = (panel, f"weight {context['weight']:.3g}", _count(length, "token"), _span(first, length))
            text = self._tokens_of_path(row, path, length, panel, shown)
            self._panel(text, "dim", *title, f"output from {output['start'] + context['offset']}{offset}")

    def _output(self, row: dict[str, Any], answer: dict[str, Any], name: str) -> None:
        """The panel of an output, after those of its contexts."""
        start, segment = answer["start"], row["segments"][answer["segment"]]
        text = self._segment(row, answer["segment"], start, start + answer["length"], "")
        self._append_cut(text, answer)
        facts = [_count(answer["length"], "token"), f"{_loss(_labels(row, answer))} with loss"]
        self._panel(text, "green", name, *facts, _span(segment["start"], answer["length"]))

    def _run(self, row: dict[str, Any], answer: dict[str, Any], name: str, shown: list[str]) -> None:
        """The panel of an answer with one context: what it sees and the answer, as one causal run."""
        path = _path(row["segments"], answer["segment"])
        before = sum(row["segments"][s]["length"] for s in path[:-1])
        before += answer["start"] - _begin(row, answer["segment"])
        length = before + answer["length"] + answer["tail"]
        text = self._tokens_of_path(row, path, length, name, shown)
        self._append_cut(text, answer)
        with_loss = f"{_loss(_labels(row, answer))} with loss"
        if name:
            self._panel(
                text, "green", name, with_loss, f"sees {_count(before, 'token')}", _span(before, answer["length"])
            )
        else:
            first = row["segments"][path[0]]["start"]
            facts = [_count(length, "token"), with_loss, _span(first, length)]
            self._panel(text, "green", "one run, context and output", *facts)

    def _tokens_of_path(self, row: dict[str, Any], path: list[int], length: int, panel: str, shown: list[str]) -> Text:
        """The first `length` tokens of a path, those that earlier panels showed shortened; marks them as shown in `panel`."""
        parts = []  # (segment, begin, end) of the tokens that no panel showed
        again: list[int] = []
        for s in path:
            begin = _begin(row, s)
            end = begin + min(row["segments"][s]["length"], length)
            length -= end - begin
            known = sum(map(bool, shown[begin:end]))  # the first tokens of a path: panels show paths from their roots
            again += range(begin, begin + known)
            if begin + known < end:
                parts.append((s, begin + known, end))
        text = self._shared(row, again, path, shown[again[-1]]) if again else Text()
        for s, begin, end in parts:
            text.append_text(self._segment(row, s, begin, end, _COLOURS[s % len(_COLOURS)]))
            shown[begin:end] = [panel] * (end - begin)
        return text

    def _append_cut(self, text: Text, answer: dict[str, Any]) -> None:
        if cut := answer["cut"]:
            text.append_text(self._tokens(cut, [_CUT] * len(cut), _LONG // 4, 0))
            text.append(f" [{_count(len(cut), 'token')} cut at max_length]", "red")

    def _facts(self, first: str, *others: str) -> Text:
        """A line of facts, the first in bold; empty ones are left out."""
        rest = "".join(self.dot + self.visible(fact) for fact in others if fact)
        return Text().append(self.visible(first), "bold").append(rest)

    def _panel(self, text: Text, style: str, *title: str) -> None:
        # Above the panel: a narrow terminal would cut a panel's own title.
        if title:
            self.console.print(self._facts(*title))
        self.console.print(Panel(text, box=box.ROUNDED, border_style=style))

    def _segment(self, row: dict[str, Any], s: int, begin: int, end: int, style: str) -> Text:
        """The tokens from `begin` to `end` of a segment, after its number where they are its first."""
        styles = [style if label == -100 else _LOSS for label in row["labels"][begin:end]]
        text = Text().append(f"[{s}]", f"{style} reverse") if begin == _begin(row, s) else Text()
        return text.append_text(self._tokens(row["texts"][begin:end], styles, _LONG * 3 // 4, _LONG // 4))

    def _shared(self, row: dict[str, Any], tokens: list[int], path: list[int], panel: str) -> Text:
        """The tokens that an earlier panel showed, without their middle if they are many."""
        texts = [row["texts"][i] for i in tokens]
        head = tail = _EDGE if len(texts) > _SHARED else len(texts)
        numbers = [s for s in path if _begin(row, s) in tokens]
        text = Text().append("".join(f"[{s}]" for s in numbers), "dim")
        text.append_text(self._tokens(texts, ["dim"] * len(texts), head, tail, note=False))
        return text.append(f" (shared with {panel}: {_count(len(texts), 'token')}) ", "dim italic")

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


def _begin(row: dict[str, Any], segment: int) -> int:
    """The index of a segment's first token."""
    return sum(other["length"] for other in row["segments"][:segment])


def _labels(row: dict[str, Any], answer: dict[str, Any]) -> list[int]:
    return row["labels"][answer["start"] : answer["start"] + answer["length"]]


def _loss(labels: list[int]) -> str:
    return f"{sum(label != -100 for label in labels):,}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _span(start: int, length: int) -> str:
    return f"positions {start}-{start + length - 1}"
