"""Whether a chat template reads a message's content as a string or as a list of parts.

vLLM's server decides it from the template's syntax tree (`_detect_content_format` in
`vllm/renderers/hf.py` of 0.32): a template that loops over a message's content gets parts,
`[{"type": "text", "text": …}]`, every other one a string. `takes_parts` decides the same without
importing vLLM; tests/vllm/test_renderer.py holds the two together.
"""

from typing import Any

from jinja2 import nodes


def takes_parts(tree: nodes.Template) -> bool:
    """Whether the template with this syntax tree gets a message's content as parts."""
    try:
        messages = _names_of_messages(tree)
        macros = {id(loop) for macro in tree.find_all(nodes.Macro) for loop in _loops(macro)}
        for loop in _loops(tree):
            over_content = any(_reads(loop.iter, name, "content") for name in messages)
            if not over_content and isinstance(loop.iter, nodes.Name):
                # A variable: a macro's parameter that a call binds to content, or `content`.
                if id(loop) in macros:
                    over_content = loop.iter.name in _content_parameters(tree, loop, messages)
                else:
                    over_content = loop.iter.name == "content"
            if over_content:
                _name(loop.target)
                return True
    except _NotAName:
        pass
    return False


class _NotAName(Exception):
    """A target of an assignment or a loop that vLLM's detection does not take: it says string."""


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _NotAName
    return target.name


def _loops(tree: nodes.Node) -> list[nodes.For]:
    return list(tree.find_all(nodes.For))


def _reads(node: Any, name: str, key: str | None = None) -> bool:
    """Whether an expression is the variable ``name``, or its ``key``, maybe filtered or sliced."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if key is not None:
        if isinstance(node, nodes.Getattr):
            read = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            read = node.arg.value
        else:
            return False
        if read != key:
            return False
        node = node.node
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _names_of_messages(tree: nodes.Template) -> list[str]:
    """The variables that stand for one message: those of loops over `messages`, or over a variable
    that is assigned from it."""
    lists = ["messages"]
    for name in lists:  # grows on the way
        for assignment in tree.find_all(nodes.Assign):
            if _reads(assignment.node, name):
                target = _name(assignment.target)
                if target not in lists:
                    lists.append(target)
    loops = (loop for loop in _loops(tree) if any(_reads(loop.iter, name) for name in lists))
    return [_name(loop.target) for loop in loops]


def _content_parameters(tree: nodes.Template, loop: nodes.For, messages: list[str]) -> set[str]:
    """The parameters of the macro around ``loop`` that some call gives a message's content."""
    found: set[str] = set()
    for macro in tree.find_all(nodes.Macro):
        if not any(inner is loop for inner in _loops(macro)):
            continue
        parameters = [_name(parameter) for parameter in macro.args]
        bound: list[tuple[str, nodes.Node]] = []
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
                bound += zip(parameters, call.args, strict=False)
                bound += [(k.key, k.value) for k in call.kwargs if k.key in parameters]
        named = {p for p, v in bound if any(_reads(v, name, "content") for name in messages)}
        found = named or found  # of nested macros the innermost that gets content
    return found
