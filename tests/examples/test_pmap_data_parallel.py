"""The example with per-device gradients learns what one device learns."""

import numpy as np

from examples import pmap_data_parallel


def test_eight_devices_equal_one(monkeypatch):
    monkeypatch.setattr(pmap_data_parallel, "WIDTH", 64)
    monkeypatch.setattr(pmap_data_parallel, "STEPS", 60)  # with a refresh at 50
    alone, together = map(pmap_data_parallel.train, (1, 8))
    assert alone[-1] < alone[0]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
