"""The tutorials learn, and print what they promise."""

import importlib
import re

import numpy as np
import pytest

from examples.tutorials.text import VOCAB, batches

UNIFORM = np.log(VOCAB)
LOSS = re.compile(r"loss ([\d.]+)( .+)?$", flags=re.MULTILINE)
TABLE_ROW = re.compile(r"^(\S+(?: \(x\d+\))?) +\([\d,]+\) +(yes|no) ", flags=re.MULTILINE)


@pytest.fixture
def printed_by(capsys, monkeypatch):
    def run(name, steps):
        tutorial = importlib.import_module(f"examples.tutorials.{name}")
        monkeypatch.setattr(tutorial, "STEPS", steps)
        tutorial.main()
        return capsys.readouterr().out

    return run


def losses_in(printed):
    return [float(loss) for loss, _ in LOSS.findall(printed)]


def projected_in(printed):
    """The lines of the table of `describe` that are projected; equal layers share one."""
    return {path for path, projected in TABLE_ROW.findall(printed) if projected == "yes"}


def entropy_of_characters():
    text = np.concatenate([batch.ravel() for batch in batches(100)])
    share = np.bincount(text, minlength=VOCAB) / text.size
    return -np.sum(share[share > 0] * np.log(share[share > 0]))


def assert_learns(losses):
    """From worse than a guess to better than knowing how frequent each character is."""
    known = entropy_of_characters()
    assert 2.5 < known < 3.5
    assert losses[0] > UNIFORM and losses[-1] < known - 0.25


def test_batches_are_text_and_repeat():
    one, other = (list(batches(2, rows=3, length=10)) for _ in range(2))
    assert one[0].shape == (3, 11)
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one[0], one[1])
    assert all(chr(code).isprintable() or code == ord("\n") for code in np.ravel(one))


def test_plain_jax(printed_by):
    printed = printed_by("plain_jax", steps=40)
    assert_learns(losses_in(printed))
    assert projected_in(printed) == {f"blocks/{name}" for name in ("qkv", "out", "up", "down")}
    together = [float(loss) for loss, how in LOSS.findall(printed) if not how]
    alone = [float(loss) for loss, how in LOSS.findall(printed) if "layer by layer" in how]
    # Steps layer by layer go on where the others stopped.
    assert len(together) == 2 and len(alone) == 3
    assert alone[0] < together[1] and alone[-1] < together[-1]


def test_flax_nnx(printed_by):
    printed = printed_by("flax_nnx", steps=55)
    assert_learns(losses_in(printed))
    attention = {f"blocks/{{0..1}}/attn/{k}/kernel (x2)" for k in ("query", "key", "value", "out")}
    assert attention < projected_in(printed)
    adamw, galore = re.findall(r"^total +([\d.]+) ([kM])B", printed, flags=re.MULTILINE)
    size = {"k": 1e3, "M": 1e6}
    assert float(galore[0]) * size[galore[1]] < 0.5 * float(adamw[0]) * size[adamw[1]]


def test_flax_linen(printed_by):
    printed = printed_by("flax_linen", steps=60)
    assert_learns(losses_in(printed))
    assert projected_in(printed) == {"Dense_0/kernel", "Dense_1/kernel"}
    first, again = (losses_in(part) for part in printed.split("again from the checkpoint"))
    assert again and again == first[-len(again) :]
    assert "bit for bit the same: True" in printed


def test_equinox(printed_by):
    printed = printed_by("equinox", steps=40)
    assert_learns(losses_in(printed))
    projected = projected_in(printed)
    assert len(projected) == 6 and all(line.endswith(" (x2)") for line in projected)
    # [out, in]: the short axis of `up` is its input, that of `down` its output.
    assert re.search(
        r"^blocks/\S+/up/weight \(x2\) +\(256,64\) +yes +input ", printed, flags=re.MULTILINE
    )
    assert re.search(
        r"^blocks/\S+/down/weight \(x2\) +\(64,256\) +yes +output", printed, flags=re.MULTILINE
    )
