"""What is compiled and exported: projections, and batches of many shapes and paddings."""

import torch
from reference import BANDS, TYPES, tiny_batch


PER_HEAD = [{"projection_type": kind, "projection_sharing": "none"} for kind in ("linear", "conv")]
OPTIONS = [
    {"projection_type": "linear", "projection_init": "mean_pool"},  # its empty slots depend on the weights
    {"projection_type": "mean_pool", "log_count_bias": True, "boundary_slots": True},
    {"projection_type": "gated_pool", **BANDS[1], "length_correction": True},
    {"projection_type": "gated_pool", **BANDS[2], "length_correction": True},
]
PROJECTIONS = TYPES + PER_HEAD + OPTIONS


def batches():
    """Batches of many shapes: 2 to 5 rows, 2 to N = 20 tokens; padded right, left, with holes, not at all, wholly."""
    for rows, length in ((5, 13), (3, 4), (4, 2), (2, 20)):
        ids, _, mask = tiny_batch(length, seed=length)
        yield ids[:rows].clone(), mask[:rows].clone()  # no views: dynamo compiles anew for each kind of view
    ids, _, mask = tiny_batch(9)
    yield ids, torch.ones_like(mask)
    mask[2] = 0
    yield ids, mask


def assert_same(got, expected):
    """Also at padding, where all states are zeros."""
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert got.isfinite().all()
