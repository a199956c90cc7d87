"""Tables of a study: as Markdown, and a digest by which the tables of two runs are compared."""

import hashlib

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def markdown(tables: list[Table]) -> str:
    parts = []
    for title, columns, rows in tables:
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def digest(tables: list[Table]) -> str:
    """A short hash, by which tables of two runs are compared."""
    return hashlib.sha256(markdown(tables).encode()).hexdigest()[:16]
