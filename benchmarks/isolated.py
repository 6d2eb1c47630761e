"""Calling a function in a process of its own: its peak of memory is nobody else's."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax


def call(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """What ``function(*arguments)`` returns or raises in a fresh interpreter.

    Args:
      function: Of a module's top level.
      *arguments: Whatever can be pickled.
      environment: Variables that are set before anything is imported there.
    """
    context = multiprocessing.get_context("spawn")
    with (
        _variables(environment or {}),
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        return pool.submit(function, *arguments).result()


def row(
    function: Callable[..., dict[str, Any]],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Like `call`, of a function that measures a row; one that does not fit says so in a note."""
    try:
        return call(function, *arguments, environment=environment)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"note": "out of memory"}


@contextlib.contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
