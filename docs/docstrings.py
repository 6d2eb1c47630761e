"""Docstrings of the package as the site shows them: Optax's form, written out in Markdown.

An extension of Griffe, which reads the docstrings for mkdocstrings.
"""

import ast
import importlib
import inspect
import re
import textwrap

import griffe
from latex2mathml.converter import convert

# `.. math::` and a paragraph ending in `::`, each followed by an indented block.
_INDENTED = r"\n+(?P<block>(?:[ \t]+\S.*\n?|\n)+)"
_MATH_BLOCK = re.compile(r"^[ \t]*\.\. math::" + _INDENTED, re.MULTILINE)
_LITERAL_BLOCK = re.compile(r"::\n" + _INDENTED)
_MATH = re.compile(r":math:`([^`]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def mathml(latex: str, *, display: str = "inline") -> str:
    """The formula in MathML, which browsers draw without any script."""
    return convert(" ".join(latex.split()), display=display)


def markdown(docstring: str) -> str:
    """What of the docstring Markdown would not understand, replaced by what it does.

    Args:
      docstring: Text with math and literal blocks as in reStructuredText.

    Returns:
      The text with MathML, fenced code and the section names that Griffe knows.
    """
    text = _MATH_BLOCK.sub(
        lambda found: f"\n<div>{mathml(found['block'], display='block')}</div>\n\n", docstring
    )
    text = _LITERAL_BLOCK.sub(
        lambda found: f":\n\n```python\n{textwrap.dedent(found['block']).strip()}\n```\n\n", text
    )
    # In a span, or Markdown would take a formula at the start of a line for a paragraph.
    text = _MATH.sub(lambda found: f"<span>{mathml(found[1])}</span>", text)
    return _EXAMPLE.sub("Examples:", text)


class OptaxStyle(griffe.Extension):
    """Rewrites every docstring before it is parsed, and uncovers what hides behind a module."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.path.startswith("galore_jax.alias."):
            _as_at_run_time(obj)
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
        _uncover(obj)

    def on_alias(self, *, alias: griffe.Alias, **_: object) -> None:
        _uncover(alias)
        _see_through(alias)

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        """A NamedTuple has fields where other classes have arguments."""
        if cls.docstring and "NamedTuple" in map(str, cls.bases):
            cls.docstring.value = cls.docstring.value.replace("\nArgs:\n", "\nAttributes:\n")


def _as_at_run_time(obj: griffe.Object) -> None:
    """Takes signatures, docstrings and values from the module, whose source has only parts."""
    computed = getattr(importlib.import_module(obj.module.path), obj.name)
    if obj.is_attribute:
        obj.value = repr(computed)
    elif obj.is_function:
        parameters = inspect.signature(computed).parameters.values()
        obj.parameters = griffe.Parameters(*(_parameter(p, obj) for p in parameters))
        obj.docstring.value = inspect.getdoc(computed)


def _parameter(parameter: inspect.Parameter, function: griffe.Object) -> griffe.Parameter:
    annotation = ast.parse(parameter.annotation, mode="eval").body
    return griffe.Parameter(
        parameter.name,
        kind=griffe.ParameterKind[parameter.kind.name.lower()],
        annotation=griffe.safe_get_annotation(annotation, parent=function),
        default=None if parameter.default is parameter.empty else repr(parameter.default),
    )


def _uncover(member: griffe.Object | griffe.Alias) -> None:
    """What a package exports under the name of a submodule is that module's member of this name.

    Griffe reads the source, and for it ``refresh.every`` is the module, not the class.
    """
    module, name = member.parent, member.name
    package = module.parent if module is not None and module.name == name else None
    if package is not None and name in map(str, package.exports or ()):
        found = member.final_target if member.is_alias else member
        package.members[name] = griffe.Alias(name, found, parent=package)


def _see_through(alias: griffe.Alias) -> None:
    """The same for who exports it from a package further up."""
    name, package = alias.name, alias.parent
    if package is None or name not in map(str, package.exports or ()):
        return
    module = alias.final_target
    if module.is_module and name in module.members:
        package.members[name] = griffe.Alias(name, module.members[name], parent=package)
