"""Proof, from a chat template's syntax tree, that it prints the text of messages and does nothing else with it.

For such templates one rendering with placeholders serves all conversations with the same roles (`chat_template.py`).
"""

from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

_NEIGHBOURS = {"previtem", "nextitem"}  # attributes of a loop that give access to messages


@lru_cache(maxsize=16)
def prints_content(template: str) -> bool:
    """Whether the template only prints the `content` of messages, perhaps trimmed, and never inspects it.

    Conservative: any other use of `content` or of a whole message gives False, and so does every filter, call or capture
    that could hide one. Templates that look for thinking, tool responses or parts in a message are among those.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    except TemplateSyntaxError:
        return False
    bound = {"messages"} | {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    return _prints(tree, bound)


class _Generation(Extension):
    """Parses transformers' `{% generation %}` tag."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _prints(node: nodes.Node, bound: set[str], printed: bool = False, item_only: bool = False) -> bool:
    """Whether nothing below `node` inspects the content of a message.

    Args:
        bound: Names that may stand for messages or for values taken from them.
        printed: Whether the value of `node` is printed unchanged.
        item_only: Whether only an item or attribute of the value of `node` is used, not the value itself.
    """
    # Printed text that is captured can be inspected later.
    if isinstance(node, nodes.AssignBlock | nodes.Macro | nodes.FilterBlock | nodes.CallBlock):
        return False
    if isinstance(node, nodes.Call):
        return isinstance(node.node, nodes.Name) and all(_prints(child, bound) for child in node.iter_child_nodes())
    if isinstance(node, nodes.Name):
        return item_only or node.ctx == "store" or node.name not in bound
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        return _item_prints(node, bound, printed, item_only)
    if isinstance(node, nodes.Filter):
        arguments = [*node.args, *node.kwargs]
        if node.node is None or arguments or node.name not in ("trim", "length"):
            return False
        # `length` uses the number of items only, never what they are.
        counts = node.name == "length"
        return _prints(node.node, bound, printed and not counts, counts)
    if isinstance(node, nodes.CondExpr):
        branches = [branch for branch in (node.expr1, node.expr2) if branch is not None]
        return _prints(node.test, bound) and all(_prints(branch, bound, printed) for branch in branches)
    if isinstance(node, nodes.For):
        rest = [child for child in node.iter_child_nodes() if child is not node.iter]
        return _prints(node.iter, bound, item_only=True) and all(_prints(child, bound) for child in rest)
    passes_on = isinstance(node, nodes.Output) or (printed and isinstance(node, nodes.Add | nodes.Concat))
    return all(_prints(child, bound, passes_on) for child in node.iter_child_nodes())


def _item_prints(node: nodes.Getattr | nodes.Getitem, bound: set[str], printed: bool, item_only: bool) -> bool:
    """`_prints` of `value.key` or `value[key]`."""
    key = nodes.Const(node.attr) if isinstance(node, nodes.Getattr) else node.arg
    if not isinstance(key, nodes.Const | nodes.Slice):
        return False  # a computed key could be any
    if isinstance(key, nodes.Const) and (key.value in _NEIGHBOURS or (key.value == "content" and not printed)):
        return False
    from_list = isinstance(key, nodes.Slice) or isinstance(key.value, int)
    return (item_only or not from_list) and _prints(node.node, bound, item_only=True)
