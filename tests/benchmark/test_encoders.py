"""The encoders of the benchmark keep what their lists say of them: who has a K, who heeds a mask."""

import dataclasses

import pytest
import torch

from linformer_hf.benchmark.encoders import BUILDERS, PROJECTED, UNMASKED, Embedded, Shape, package


SHAPE = Shape(64, 32, 2, 66, 1, 0.0, 16)


def built(name: str, shape: Shape) -> torch.nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name](shape).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_another_k_changes_those_that_have_one_and_no_other(name):
    states = torch.randn(1, 64, 32)
    of_16, of_12 = (built(name, dataclasses.replace(SHAPE, projected_length=k))(states) for k in (16, 12))
    assert torch.equal(of_16, of_12) == (name not in PROJECTED)


# Nystromformer's convolution of 65 values takes no mask, although its attention does.
@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "nystromformer"])
def test_what_stands_in_padding_moves_the_answers_of_the_unmasked_alone(name):
    model, states, real = built(name, SHAPE), torch.randn(1, 64, 32), 40
    assert isinstance(model, Embedded) == (name not in UNMASKED)  # what takes a mask at all
    other = states.clone()
    other[:, real:] = torch.randn(1, 64 - real, 32)
    mask = [] if name in UNMASKED else [(torch.arange(64) < real).long()[None]]
    first, second = (model(rows, *mask)[:, :real] for rows in (states, other))
    assert torch.allclose(first, second, atol=1e-6) == (name not in UNMASKED)


def test_ours_share_one_e_unless_the_shape_says_otherwise():
    options = {
        name: built(name, SHAPE).model.config
        for name in ("linformer_hf", "linformer_hf mean_pool", "linformer_hf converted")
    }
    ours, pooled, converted = options.values()
    assert (ours.projection_type, ours.projection_sharing, ours.projected_length) == ("linear", "layerwise", 16)
    assert pooled.projection_type == "mean_pool"
    assert (converted.projection_type, converted.local_window) == ("gated_pool", 4)
    assert converted.boundary_slots
    assert converted.length_correction
    other = dataclasses.replace(SHAPE, projection_sharing="headwise")
    assert built("linformer_hf", other).model.config.projection_sharing == "headwise"


def test_a_missing_package_is_named_with_the_way_around_it():
    wanted = r"'no_such_encoder' is not installed: .*leave no-such-encoder out of benchmark\.alternatives\.$"
    with pytest.raises(ImportError, match=wanted):
        package("no_such_encoder")
