"""Signatures and docstrings of functions that pass options on to another function."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def spelled_out(
    general: Callable[..., Any], *hidden: str, **defaults: Any
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Names and explains the ``**options`` that a function passes on to `general`.

    The function declares and documents its own arguments, and those of `general` that it treats
    in another way. `inspect.signature`, `help` and all that is built on them see every argument.

    Args:
      general: Function that gets the options.
      hidden: Arguments of `general` that the function does not take; its own stand in the place
        of the first.
      defaults: Defaults of options that differ from those of `general`.

    Returns:
      A decorator. The decorated function fills in all defaults, and raises TypeError for
      arguments that it does not have.

    Example:
      >>> @spelled_out(sorted, "key", reverse=True)
      ... def ranked(iterable, /, *, cost=len, **options):
      ...     return sorted(iterable, key=cost, **options)
      >>> ranked(["a", "ccc", "bb"])
      ['ccc', 'bb', 'a']
    """
    options = inspect.signature(general).parameters

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        *declared, _ = inspect.signature(function).parameters.values()
        own = {parameter.name: parameter for parameter in declared}
        merged: dict[str, inspect.Parameter] = {}
        for name, option in options.items():
            if name not in hidden:
                default = defaults.get(name, option.default)
                passed_on = option.replace(kind=option.KEYWORD_ONLY, default=default)
                merged[name] = own.get(name, passed_on)
            elif name == hidden[0]:
                merged |= {name: p for name, p in own.items() if name not in options}
        result = inspect.signature(function).return_annotation
        signature = inspect.Signature(list(merged.values()), return_annotation=result)
        if function.__doc__ and general.__doc__:  # `python -OO` leaves none
            function.__doc__ = _merged_docstring(function.__doc__, general.__doc__, list(merged))

        @functools.wraps(function)
        def spelled(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            bound.apply_defaults()
            return function(*bound.args, **bound.kwargs)

        vars(spelled)["__signature__"] = signature
        annotations = {name: parameter.annotation for name, parameter in merged.items()}
        spelled.__annotations__ = annotations | {"return": result}
        return spelled

    return decorate


def _merged_docstring(own: str, general: str, names: list[str]) -> str:
    """`own` with the Args of `general` that it lacks, its Returns, and its References as well."""
    ours, theirs = _sections(own), _sections(general)
    entries = re.split(r"\n(?=  \w)", "\n".join([theirs["Args"], ours.get("Args", "")]))
    explained = {entry.partition(":")[0].strip(): entry for entry in entries}
    sections = theirs | ours
    sections["Args"] = "\n".join(explained[name] for name in names)
    sections["References"] = "\n".join(filter(None, [theirs["References"], ours.get("References")]))
    titles = ("Args", "Returns", "Example", "References")
    return "\n\n".join([ours[""], *(f"{title}:\n{sections[title]}" for title in titles)])


def _sections(docstring: str) -> dict[str, str]:
    """Parts of a docstring by title; the first has none."""
    titles = r"^(Args|Returns|Raises|Example|References):\n"
    parts = re.split(titles, inspect.cleandoc(docstring), flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], map(str.rstrip, parts[::2]), strict=True))
