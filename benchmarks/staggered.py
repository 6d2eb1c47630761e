"""Time of every phase of a refresh period, all matrices together and staggered.

python -m benchmarks.staggered [--size 350M] [--gap 25] [--periods 5]
"""

import argparse
import time
from typing import Any

import jax
import numpy as np

import galore_jax as gj
from benchmarks import report
from benchmarks.llama_block import TRIAL_SIZES, BlockSize, random_block


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=TRIAL_SIZES)
    parser.add_argument("--gap", type=int, default=25)
    parser.add_argument("--periods", type=int, default=5)
    options = parser.parse_args()
    policies = (gj.refresh.every(options.gap), gj.refresh.staggered(options.gap))
    rows = [
        {"refresh": str(policy), **phases(TRIAL_SIZES[options.size], policy, options.periods)}
        for policy in policies
    ]
    title = f"Phases of a refresh period, one {options.size} block, milliseconds"
    report.publish(title, rows, "staggered")


def phases(size: BlockSize, policy: Any, periods: int) -> dict[str, float]:
    """Slowest and median phase; a phase's time is its minimum over the periods."""
    tx = gj.galore(1e-2, size.rank, policy)
    gradients, params = random_block(size, 0), random_block(size, 1)
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    seconds = np.zeros((periods + 1, policy.gap))
    for step in range((periods + 1) * policy.gap):
        start = time.perf_counter()
        updates, state = update(gradients, state, params)
        jax.block_until_ready((updates, state))
        seconds[divmod(step, policy.gap)] = time.perf_counter() - start
    # The first period compiles, and refreshes everything at count 0 whatever the policy.
    best, typical = seconds[1:].min(axis=0) * 1e3, np.median(seconds[1:], axis=0) * 1e3
    slowest, median = float(best.max()), float(np.median(best))
    return {
        "slowest / median": slowest / median,
        "slowest": slowest,
        "median": median,
        "slowest, by the median of the periods": float(typical.max()),
        "median, by the median of the periods": float(np.median(typical)),
    }


if __name__ == "__main__":
    main()
