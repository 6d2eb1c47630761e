"""The `targets` argument: the leaves that take part."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from galore_jax.leaves import abstract
from galore_jax.rules import Rule

Targets = str | Sequence[str] | Callable[[str, Any], bool] | None

# Patterns match a whole component of a path in lower-case words: `LMHead_0` reads "lm_head".
_EMB = r"[a-z]*(emb|embs|embed|embeds|embedding|embeddings|embedder|embedders)|wte|wpe"
_NORM = r"[a-z]*norms?|normali[sz]ation|ln|bn|gn"
# `embed_tokens` looks up rows, `embed_proj` and `emb_layers` multiply with a matrix.
_NO_PRODUCT = r"(?!\w+_(proj|projection|project|dense|linear|layers?|mlp)$)"
_EXEMPT = (
    # kind, pattern, where: in any component; in the last two (leaf and module); there, in no block
    ("output head", r"(\w+_)?lm_head|(?!pre_)(\w+_)?logits|logits_\w+", "any"),
    ("output head", r"output_head|predictions|unembed\w*|embed_out|w_u", "any"),
    ("embedding", rf"(\w+_)?({_EMB})|{_NO_PRODUCT}({_EMB})_\w+|w_e|w_pos", "own"),
    ("output head", r"head|out|output|output_(layer|projection)|proj_out", "outside"),
    ("output head", r"classifier|score", "outside"),
    ("embedding", r"shared", "outside"),
)
_VECTOR = r"(\w+_)?(bias|biases|scales?)|b_(q|k|v|o|in|out)"
_NORM_MODULE = rf"(\w+_)?({_NORM}|bias)|{_NO_PRODUCT}({_NORM})_\w+"
# Names for a vector in a norm and for a matrix in a product. A `kernel` is always a matrix.
_ANY_TENSOR = r"weights?|w|g|b|gamma|beta|offset|shift"
_BLOCK = (
    r"[a-z]*(block|layer)s?|h|[a-z]*(attn|attention)s?|att|mlp|ffn?|feed|experts?|moe|mixer|stages?|"
    r"cells?|units?"
)
# No stack has more layers: of two longer axes, neither counts them.
_MOST_LAYERS = 512
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


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


@functools.lru_cache(maxsize=1 << 14)  # asked anew for every leaf at every step outside `jax.jit`
def exemption(path: str, shape: tuple[int, ...]) -> str | None:
    """The reason for which a leaf stays at full size by default, by the papers' rule.

    ===============  ==============================================================================
    stays            because of
    ===============  ==============================================================================
    output head      `lm_head`, `logits`, `unembed`, `output_head` or `predictions` anywhere in the
                     path; a leaf or module called `head`, `output`, `out`, `proj_out`, `classifier`
                     or `score` outside of blocks
    embedding        a name that begins or ends with `embed`, `embedding`, `embedder`, `emb`, `wte`
                     or `wpe`, of the leaf or of its module; `shared` outside of blocks
    norm or bias     a leaf called `bias`, `scale` or like a norm, or the `weight` of a norm, unless
                     its last two axes are both longer than 512: no stack has so many layers
    ===============  ==============================================================================

    Names are compared word by word: `LMHead_0` is "lm head", `enormous` is no norm. What lies below
    a numbered component (`layers/0`, `Block_1`) or one that is called like a part of a block
    (`blocks`, `attention`, `mlp`) is inside of a block.

    Args:
      path: Path of the leaf, as in `LeafPlan`.
      shape: Its shape.

    Returns:
      What it is and the name that says so; None if it takes part.

    Example:
      >>> from galore_jax.views.targets import exemption
      >>> exemption("decoder/token_embedder/embedding", (32000, 512))
      'embedding (token_embedder)'
      >>> exemption("layers/PreNorm_0/fn/to_qkv/kernel", (512, 1536))
    """
    parts = re.findall(r"[\w-]+", path)
    if parts[-1:] in (["value"], ["raw_value"]):  # of a Flax NNX variable
        parts.pop()
    names = [part for part in parts if not part.isdigit()]
    named = [(name, "_".join(_WORD.findall(name)).lower()) for name in ("", "", *names)]
    for kind, pattern, whose in _EXEMPT:
        for name, words in named if whose == "any" else named[-2:]:
            if re.fullmatch(pattern, words) and not (whose == "outside" and _in_block(parts, name)):
                return f"{kind} ({name})"
    if len(shape) < 2 or min(shape[-2:]) <= _MOST_LAYERS:
        (module, module_words), (leaf, leaf_words) = named[-2:]
        if re.fullmatch(f"{_VECTOR}|{_NORM_MODULE}", leaf_words):
            return f"norm or bias ({leaf})"
        if re.fullmatch(_ANY_TENSOR, leaf_words) and re.fullmatch(_NORM_MODULE, module_words):
            return f"norm or bias ({module})"
    return None


def _in_block(parts: list[str], name: str) -> bool:
    """Whether other components of the path number or name a block."""
    at = parts.index(name)
    numbered = any(re.fullmatch(r"\d+|\w+_\d+", part) for part in parts[:at])
    words = _WORD.findall(" ".join(parts[:at] + parts[at + 1 :]))
    return numbered or any(re.fullmatch(_BLOCK, word.lower()) for word in words)


def is_target(targets: Targets, path: str, leaf: Any) -> bool:
    """Applies the `targets` argument to one leaf."""
    if targets is None:
        return exemption(path, abstract(leaf).shape) is None
    if callable(targets):
        return bool(targets(path, leaf))
    return any(re.search(pattern, path) for pattern in patterns(targets))


def patterns(targets: Targets) -> tuple[str, ...]:
    """The regexes of the `targets` argument; none if it is something else."""
    if targets is None or callable(targets):
        return ()
    return (targets,) if isinstance(targets, str) else tuple(targets)


def targets_rule(targets: Any) -> Targets:
    """The `targets` argument, checked, as something static: hashable and comparable."""
    if targets is None or targets is all_matrices:
        return targets
    if callable(targets):
        return Rule.of("targets", targets)
    found = patterns(targets) if isinstance(targets, str | list | tuple) else ()
    if not found or not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(
            "`targets` must be a regex on the leaf path, a list of them, or a callable(path, leaf) "
            f"-> bool, got {targets!r}."
        )
    for pattern in found:
        check_regex("targets", pattern)
    return targets if isinstance(targets, str) else found


def check_regex(option: str, pattern: str) -> None:
    """Raises if a pattern that was given as `option` cannot be compiled."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{option}` is not a valid regex: {pattern!r} ({error}).") from error
