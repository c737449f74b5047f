"""torch.export gives what eager gives, at any batch size, length and padding."""

import pytest
import torch
from graphs import PROJECTIONS, assert_same, batches
from reference import name_of, tiny_batch, tiny_model

from linformer_hf import LinformerForMaskedLM


each_projection = pytest.mark.parametrize("projection", PROJECTIONS, ids=name_of)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.set_num_threads(1)
    torch.compiler.reset()


@each_projection
def test_export_with_dynamic_batch_and_length_equals_eager(projection):
    model = tiny_model(LinformerForMaskedLM, **projection)
    ids, _, mask = tiny_batch(length=11)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=20)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    inputs = {"input_ids": ids, "attention_mask": mask}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    with torch.no_grad():
        for ids, mask in batches():
            got = exported(input_ids=ids, attention_mask=mask).logits
            assert_same(got, model(ids, mask).logits)


@each_projection
def test_export_without_a_mask_equals_eager(projection):
    model = tiny_model(LinformerForMaskedLM, **projection)
    ids, _, _ = tiny_batch(length=11)
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=20)}}
    exported = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes).module()
    with torch.no_grad():
        for ids, _ in batches():
            got = exported(input_ids=ids).logits
            torch.testing.assert_close(got, model(ids).logits, atol=2e-5, rtol=2e-5)
