"""Which leaves take part."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Targets = str | Callable[[str, Any], bool] | None

# Each alternative must match a whole path component: `embed`, `pos_embed`, `Embed_0`, `ln_f`, ...
_EMBEDDINGS = r"(\w+_)?(embed|embeds|embedding|embeddings|embedder|wte|wpe)(_\w+)?"
_OUTPUT_HEAD = r"lm_head|unembed\w*|output_head|logits\w*"
_NORMS_AND_BIASES = r"\w*norm\w*|ln|ln_?\w{1,5}|scale|(\w+_)?bias"
_EXCLUDED = re.compile(
    rf"(^|/)({_EMBEDDINGS}|{_OUTPUT_HEAD}|{_NORMS_AND_BIASES})(/|$)", re.IGNORECASE
)


def all_matrices(path: str, leaf: Any) -> bool:
    """`targets=` that takes every leaf with a matrix view: no embedding or norm is left out.

    Args:
      path: "/"-joined path of the leaf.
      leaf: The leaf, or anything with its shape.

    Returns:
      True, always; leaves without a matrix view stay unprojected all the same.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_adamw(1e-2, rank=4, targets=gj.all_matrices)
    """
    del path, leaf
    return True


def default_targets(path: str, leaf: Any) -> bool:
    """The papers' rule: embeddings, output head, norms, scales and biases stay full-rank."""
    del leaf
    return _EXCLUDED.search(path) is None


def is_target(targets: Targets, path: str, leaf: Any) -> bool:
    """Applies the `targets` argument to one leaf."""
    if targets is None:
        return default_targets(path, leaf)
    if isinstance(targets, str):
        return re.search(targets, path) is not None
    return bool(targets(path, leaf))


def check_targets(targets: Targets) -> None:
    """Raises if `targets` is neither None, a valid regex nor a callable."""
    if targets is None or callable(targets):
        return
    if not isinstance(targets, str):
        raise TypeError(
            f"`targets` must be a regex on the leaf path or a callable(path, leaf) -> bool, "
            f"got {targets!r}."
        )
    try:
        re.compile(targets)
    except re.error as error:
        raise ValueError(f"`targets` is not a valid regex: {targets!r} ({error}).") from error
