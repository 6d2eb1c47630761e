"""What lives at the same time in a training step, besides weights and optimizer state.

A step goes through phases; its peak is that of the fullest one. T = rows x tokens, D, F, V, L as in
`Sizes`, e is the size of an activation. The counts of arrays are those that XLA keeps when it
compiles this model for CUDA; the formulas are checked against compiled steps, not fitted to them.
"""

from __future__ import annotations

from typing import NamedTuple

from examples.llama.planning.sizes import FP32, Sizes

SAVED, INSIDE, LOGITS, GRADIENTS, UPDATE = (
    "saved activations",
    "inside one block",
    "logits",
    "gradients",
    "update",
)


class Phase(NamedTuple):
    """A part of a step.

    Args:
        name: what happens in it.
        terms: bytes that live then, by what they are for.
    """

    name: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def phases(s: Sizes, *, guarded: bool = True) -> list[Phase]:
    """All phases of a step.

    Args:
        s: its sizes.
        guarded: whether an update that is not finite is skipped as a whole (ordinary steps).
    """
    return layerwise_phases(s) if s.layerwise else ordinary_phases(s, guarded=guarded)


def ordinary_phases(s: Sizes, *, guarded: bool = True) -> list[Phase]:
    """All gradients first, then the update.

    XLA gives gradients their place before the forward pass. A guarded update that is done in place
    has the zeros of a skipped one ready all along, one for each shape; one that is not in place
    makes the new state before the old one is given up.
    """
    gradients = s.gradients.total + s.gradients.sums
    zeros = s.gradients.shapes if guarded and s.in_place else 0
    renewed = 0 if s.in_place else s.params + (s.state if guarded else 0)
    walk = {GRADIENTS: gradients, SAVED: saved(s), UPDATE: zeros}
    return [
        Phase("head", walk | {LOGITS: logits(s)}),
        Phase("attention of a block", walk | {INSIDE: attention(s)}),
        Phase("MLP of a block", walk | {INSIDE: mlp(s)}),
        Phase("update", {GRADIENTS: gradients, UPDATE: zeros + renewed}),
    ]


def layerwise_phases(s: Sizes) -> list[Phase]:
    """One block's gradient at a time, VDp for the head before and the embedding after the blocks.

    Clipping waits for the norm: then the head's gradient is there until the blocks were walked. So
    are the sums of micro-batches.
    """
    head = s.vocab * s.width * s.param_item
    walk = {
        GRADIENTS: s.gradients.layer + s.gradients.sums + s.clipped * head,
        SAVED: saved(s),
    }
    return [
        Phase("head", {GRADIENTS: head, SAVED: saved(s), LOGITS: logits(s)}),
        Phase("attention of a block", walk | {INSIDE: attention(s)}),
        Phase("MLP of a block", walk | {INSIDE: mlp(s)}),
        Phase("update of a block", walk | {UPDATE: block_update(s)}),
        Phase("update of the embedding", {GRADIENTS: (1 + s.clipped) * head}),
    ]


def saved(s: Sizes) -> int:
    """What the forward pass leaves for the backward pass.

    The input of every block, LTDe. Without recomputation all that a block's derivative reads: six
    [T, F], six [T, D], four [T, D] in fp32, and the scores in fp32 and as probabilities,
    (4 + e) heads S^2 per sequence, unless they are computed in pieces, which are never kept.
    """
    if s.remat:
        return s.layers * s.tokens * s.width * s.item
    features, stream = s.tokens * s.inner, s.tokens * s.width
    in_pieces = s.queries < s.length
    scores = 0 if in_pieces else (FP32 + s.item) * s.rows * s.heads * s.length**2
    return s.layers * (s.item * 6 * features + (6 * s.item + 4 * FP32) * stream + scores)


def logits(s: Sizes) -> int:
    """Of the tokens whose logits exist at once: in fp32, their derivative, and in activations.

    (8 + e) B C V, with C `head_tokens`.
    """
    return (2 * FP32 + s.item) * s.rows * s.head_tokens * s.vocab


def attention(s: Sizes) -> int:
    """The block's weights, its scores, and twelve [T, D].

    Those are the input and the output's derivative, both norms and what they normalise, q, k, v and
    the mixed values, and the derivatives of two of them.
    """
    return s.layer + scores(s) + 12 * s.tokens * s.width * s.item


def scores(s: Sizes) -> int:
    """Scores in fp32, their derivative, and that of the probabilities: (8 + e) B heads Q S.

    Q queries at a time.
    """
    return (2 * FP32 + s.item) * s.rows * s.heads * s.queries * s.length


def mlp(s: Sizes) -> int:
    """The block's weights, nine [T, D], and the [T, F] of a gated MLP.

    Those are gate, up and their product, and the derivatives of the three: six. Where the backward
    pass projects, it does so matrix by matrix, which leaves four of them alive; `range_finder` then
    comes on top, and of coded weights that of the product (down) is no longer needed.
    """
    stream = 9 * s.tokens * s.width * s.item
    features = s.tokens * s.inner * s.item
    if not s.projected:
        return s.layer + stream + 6 * features
    return s.layer - s.coded * s.matrix + stream + 4 * features + range_finder(s)


def range_finder(s: Sizes) -> int:
    """A refresh of one matrix of the MLP: input and derivative of the output in fp32, 4 T (D + F).

    And a product of the size of the projected gradient.
    """
    return FP32 * s.tokens * (s.width + s.inner) + s.gradients.largest_low_rank


def block_update(s: Sizes) -> int:
    """The update of the block's largest matrix, lifted, and the weights that it is added to."""
    return 2 * s.matrix // s.item * s.param_item
