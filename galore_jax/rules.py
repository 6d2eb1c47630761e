"""Callables as static values: compared by what they run, not by which object they are."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import math
import pickle
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np

# Their text says all about them.
_PLAIN = (
    int, float, complex, str, bytes, range, type(None), type(...), enum.Enum,
    np.dtype, np.generic, types.ModuleType, types.MethodDescriptorType,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rule:
    """A callable option of an optimizer, as a part of a static configuration.

    Two rules are equal if their callables run the same code with the same values: module,
    qualified name, bytecode, defaults and closure. Numbers, strings, containers, patterns, frozen
    dataclasses and functions count by value, as they are when the rule is made; global variables
    by name; all other objects by identity. Pickling drops a callable that cannot be pickled (a
    lambda); what is left compares as before.

    Args:
      option: Argument that the callable was given for.
      name: Qualified name of the callable.
      digest: Hash of what it runs.
      objects: What it refers to by identity; equal to nothing any more once they were pickled.
      function: The callable; None if it was dropped.

    Example:
      >>> from galore_jax.rules import Rule
      >>> def constant(rank):
      ...     return Rule.of("rank", lambda path, leaf: rank)
      >>> constant(8) == constant(8), constant(8) == constant(4)
      (True, False)
    """

    option: str
    name: str
    digest: str
    objects: tuple[float, ...]
    function: Any = dataclasses.field(compare=False)

    @classmethod
    def of(cls, option: str, function: Callable[..., Any]) -> Rule:
        """Makes a rule of a callable; a rule stays as it is."""
        if isinstance(function, Rule):
            return function
        objects: list[float] = []
        text = _text(function, objects, ()).encode(errors="surrogatepass")
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return cls(option, name, hashlib.sha256(text).hexdigest(), tuple(objects), function)

    def __call__(self, *args: Any) -> Any:
        if self.function is None:
            raise ValueError(
                f"`{self.option}` was the callable {self.name}, which cannot be pickled and is "
                "missing in this state. Hand the state to the `update` of the transformation, "
                f"which has it; or give `{self.option}` as a function of a module (`axes` and "
                "`targets` also as a regex)."
            )
        return self.function(*args)

    def __repr__(self) -> str:
        return f"<{self.name} {self.digest[:8]}>"

    def __deepcopy__(self, memo: Any = None) -> Rule:
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> Any:
        try:
            pickle.dumps(self.function)
            function = self.function
        except Exception:  # of any kind: it comes from the callable
            function = None
        unequal = (math.nan,) * len(self.objects)
        return Rule, (self.option, self.name, self.digest, unequal, function)


def _text(value: Any, objects: list[float], above: tuple[int, ...]) -> str:
    """Text that is the same for equal values; what has none is added to `objects`."""
    kind = type(value).__qualname__
    if id(value) in above:
        return f"above {above.index(id(value))}"  # a function that calls itself
    is_global = isinstance(value, type) and "<locals>" not in value.__qualname__
    if is_global or isinstance(value, _PLAIN):
        return f"{kind} {value!r}"
    parts = _parts(value)
    if parts is None:
        objects.append(id(value))
        return "object"
    texts = [_text(part, objects, (*above, id(value))) for part in parts]
    if isinstance(value, set | frozenset):
        texts.sort()
    return f"{kind}({''.join(f'{len(text)} {text}' for text in texts)})"


def _parts(value: Any) -> Any:
    """The values that a value consists of; None if that is not known."""
    match value:
        case types.FunctionType(__module__=module, __qualname__=name):
            defaults = value.__defaults__, value.__kwdefaults__
            return module, name, value.__code__, defaults, value.__closure__
        case types.CodeType():
            names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
            counts = (value.co_argcount, value.co_kwonlyargcount, value.co_flags)
            return value.co_code, value.co_exceptiontable, value.co_consts, names, counts
        case types.CellType():  # one that nothing was assigned to yet has no contents
            return [] if repr(value).endswith(" empty>") else [value.cell_contents]
        case types.MethodType() | types.BuiltinFunctionType():
            return value.__qualname__, getattr(value, "__func__", None), value.__self__
        case functools.partial():
            return value.func, value.args, value.keywords
        case re.Pattern():
            return value.pattern, value.flags
        case dict():
            return value.items()
        case tuple() | list() | set() | frozenset():
            return value
    frozen = getattr(getattr(value, "__dataclass_params__", None), "frozen", False)
    if frozen and not isinstance(value, type):
        return type(value), *(getattr(value, field.name) for field in dataclasses.fields(value))
    return None
