r"""A Sphinx extension: API pages from docstrings, which are Markdown with Google's sections.

    ```{docstring} trl_miso.generation.miso_generate
    ```

writes the signature and the docstring of a function, of a class (with the methods named in the option `members`) or of a module.
autodoc reads docstrings as reStructuredText, to which backticks, tables and words like `hub_` mean something else.
"""

import inspect
import re
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_SECTION = re.compile(r"(Args|Arguments|Attributes|Parameters|Raises|Returns|Yields|Example|Examples|Note|Notes):")
_ITEM = re.compile(r"(?P<name>[\w`*][\w.`* ,\[\]|]*?)(?P<type> \(.*?\))?: ?(?P<text>.*)")
_LINK = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\]")  # as Hugging Face's documents write links
_LISTS = ("Args", "Arguments", "Attributes", "Parameters", "Raises")


class Docstring(SphinxDirective):
    """`{docstring} dotted.name`."""

    required_arguments = 1
    option_spec = {"members": directives.unchanged, "no-signature": directives.flag}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        thing = _find(name)
        lines = markdown(inspect.getdoc(thing) or "")
        if not inspect.ismodule(thing):
            signature = name.rpartition(".")[2] if "no-signature" in self.options else _signature(name, thing)
            for member in self.options.get("members", "").split():
                method = getattr(thing, member)
                lines += [
                    "",
                    *_described("method", _signature(member, method), markdown(inspect.getdoc(method) or ""), "::::"),
                ]
            lines = _described("class" if inspect.isclass(thing) else "function", signature, lines, ":::::")
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source=f"docstring of {name}"), self.content_offset, node)
        return node.children


def markdown(docstring: str) -> list[str]:
    """Lines of a docstring, its Google sections as bold words and lists."""
    lines: list[str] = []
    section = ""
    for line in _LINK.sub(r"`\1`", docstring).splitlines():
        if heading := _SECTION.fullmatch(line):
            section = heading[1]
            lines += ["", f"**{section}**", ""]
        elif line and not line.startswith(" "):
            section = ""
            lines.append(line)
        elif section:
            lines.append(_section_line(section, line[4:]))
        else:
            lines.append(line)
    return lines


def _section_line(section: str, line: str) -> str:
    """A line of a section, which is indented by four spaces: `name: text` begins an item."""
    if section not in _LISTS or not line:
        return f"    {line}" if line.startswith((">>>", "...")) else line
    if line.startswith(" "):
        return f"  {line.strip()}"
    item = _ITEM.fullmatch(line)
    if not item:
        return line
    name = item["name"].strip("`")
    return f"- `{name}`{item['type'] or ''}: {item['text']}"


def _described(kind: str, signature: str, lines: list[str], fence: str) -> list[str]:
    return [f"{fence}{{py:{kind}}} {signature}", *lines, fence]


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    # Annotations stand in the text, with what they mean.
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in own]
    return f"{name.rpartition('.')[2]}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def _find(name: str) -> Any:
    """The module, class or function of a dotted name."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(import_module(module), attribute)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("docstring", Docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
