"""torch.compile gives what eager gives, at any batch size, length and padding."""

import pytest
import torch
from graphs import OPTIONS, PROJECTIONS, assert_same, batches
from reference import TYPES, name_of, tiny_batch, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from linformer_hf import LinformerForMaskedLM, LinformerForSequenceClassification


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.set_num_threads(1)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("projection", "masked"),
    # `fixed` computes what `linear` does; the last two bands are more than the first.
    [(projection, True) for projection in PROJECTIONS if projection not in (TYPES[1], TYPES[-1])]
    + [(projection, False) for projection in (TYPES[0], *TYPES[2:-1], OPTIONS[1], OPTIONS[-1])],
    ids=lambda value: name_of(value) if isinstance(value, dict) else f"mask={value}",
)
def test_one_graph_equals_eager_in_outputs_and_gradients(projection, masked):
    """`fullgraph=True` raises on a graph break; aot_eager traces forward and backward without generating code.

    One layer: a second one is traced like the first, for as many seconds.
    """
    model = tiny_model(LinformerForMaskedLM, num_hidden_layers=1, **projection)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    assert model._can_compile_fullgraph
    for number, (ids, mask) in enumerate(batches()):
        if ids.shape[1] == 20 and projection != TYPES[0]:
            continue  # length N is one more graph, and differs only in the columns of E
        mask = mask if masked else None
        expected = model(ids, mask)
        got = compiled(input_ids=ids, attention_mask=mask)
        assert_same(got.logits, expected.logits)
        if number:  # gradients once: the graph is the same
            continue
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [
            torch.autograd.grad(o.logits.square().mean(), parameters, allow_unused=True) for o in (got, expected)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projection", [TYPES[0], OPTIONS[-1]], ids=name_of)
def test_generated_code_equals_eager(projection):
    """The default backend, with its own kernels, on the default projection and a band, and a head with a pooler."""
    model = tiny_model(LinformerForSequenceClassification, num_hidden_layers=1, **projection)
    compiled = torch.compile(model, fullgraph=True)
    ids, _, mask = tiny_batch()
    with torch.no_grad():
        got = compiled(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(got, model(ids, mask).logits, atol=2e-5, rtol=2e-5)


def graphs(model) -> int:
    """How many graphs are compiled for inputs of many lengths, longer and shorter than K, with a mask and without."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.eval(), backend=counter)
    with torch.no_grad():
        for length in (20, 7, 3, 15, 18):
            for rows in (3, 2):
                ids = torch.randint(1, 50, (rows, length))
                mask = (torch.arange(length) < torch.tensor([[length // 2], [length], [length]])[:rows]).long()
                compiled(ids)
                compiled(ids, attention_mask=mask)
    return counter.frame_count


@pytest.fixture(scope="module")
def graphs_of_bert() -> int:
    sizes = {name: getattr(tiny_config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    return graphs(BertModel(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)))


@pytest.mark.parametrize("kind", [TYPES[0], *TYPES[2:4], TYPES[-1]], ids=name_of)
def test_calls_with_and_without_a_mask_compile_no_more_graphs_than_bert(kind, graphs_of_bert):
    """torch gives up at 8."""
    assert graphs(tiny_model(num_hidden_layers=1, **kind)) <= graphs_of_bert <= 6


@pytest.mark.parametrize("kind", [TYPES[0], TYPES[-1]], ids=name_of)
def test_trainer_compiles_a_bounded_number_of_graphs(kind, tmp_path):
    """Batches of many lengths, with padding and without: 3 and 2 graphs were counted (BERT: 3), none of them broken."""
    silent = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    size = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    arguments = TrainingArguments(output_dir=str(tmp_path), **silent, **compiled, **size)
    ids, _, mask = tiny_batch(20)
    # Of a batch: its length, and that of its second row.
    lengths = [(20, 1), (7, 7), (3, 2), (15, 15), (18, 9), (5, 5), (2, 2), (11, 4)]
    batches = [
        {"input_ids": ids[:2, :n].clone(), "attention_mask": mask.new_ones(2, n), "labels": ids[:2, 0] % 2}
        for n, _ in lengths
    ]
    for (_, real), batch in zip(lengths, batches, strict=True):
        batch["attention_mask"][1, real:] = 0
    rows = [(number, row) for number in range(len(batches)) for row in range(2)]
    counters.clear()
    Trainer(
        model=tiny_model(LinformerForSequenceClassification, num_hidden_layers=1, **kind),
        args=arguments,
        train_dataset=rows,
        data_collator=lambda drawn: batches[drawn[0][0]],
    ).train()
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
