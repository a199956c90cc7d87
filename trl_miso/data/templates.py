"""What a chat template does with the text of a message, read from the template itself."""

from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

_MESSAGES = {"previtem", "nextitem"}  # of a loop


@lru_cache(maxsize=16)
def prints_content(template: str) -> bool:
    """Whether the template does nothing with `content` but print it, perhaps trimmed: it never looks into it.

    Conservative: any other use of `content`, of whole messages, and every filter, call or capture that could hide one is
    a no. Templates that look into messages (for thinking, tool responses, parts) are among those.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    except TemplateSyntaxError:
        return False
    bound = {"messages"} | {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    return _prints(tree, bound)


class _Generation(Extension):
    """transformers' `{% generation %}` tag, for parsing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _prints(node: nodes.Node, bound: set[str], printed: bool = False, inside: bool = False) -> bool:
    """`printed`: the value of `node` is printed as it is. `inside`: only an item of the value of `node` is used."""
    if isinstance(node, nodes.AssignBlock | nodes.Macro | nodes.FilterBlock | nodes.CallBlock):
        return False  # what is printed within them can be looked into later
    if isinstance(node, nodes.Call):
        return isinstance(node.node, nodes.Name) and all(_prints(child, bound) for child in node.iter_child_nodes())
    if isinstance(node, nodes.Name):
        return inside or node.ctx == "store" or node.name not in bound
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        key = nodes.Const(node.attr) if isinstance(node, nodes.Getattr) else node.arg
        if not isinstance(key, nodes.Const | nodes.Slice):
            return False  # whatever it may be
        if isinstance(key, nodes.Const) and (key.value in _MESSAGES or (key.value == "content" and not printed)):
            return False
        of_a_list = isinstance(key, nodes.Slice) or isinstance(key.value, int)
        return (inside or not of_a_list) and _prints(node.node, bound, inside=True)
    if isinstance(node, nodes.Filter):
        arguments = [*node.args, *node.kwargs]
        if node.node is None or arguments or node.name not in ("trim", "length"):
            return False
        counted = node.name == "length"
        return _prints(node.node, bound, printed and not counted, counted)
    if isinstance(node, nodes.CondExpr):
        branches = [branch for branch in (node.expr1, node.expr2) if branch is not None]
        return _prints(node.test, bound) and all(_prints(branch, bound, printed) for branch in branches)
    if isinstance(node, nodes.For):
        rest = [child for child in node.iter_child_nodes() if child is not node.iter]
        return _prints(node.iter, bound, inside=True) and all(_prints(child, bound) for child in rest)
    keeps = isinstance(node, nodes.Output) or (printed and isinstance(node, nodes.Add | nodes.Concat))
    return all(_prints(child, bound, keeps) for child in node.iter_child_nodes())
