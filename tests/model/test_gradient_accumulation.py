"""One optimizer step is one step, however it is cut into micro-batches: the real `Trainer`, every head.

Micro-batches hold unequal numbers of labels, so the mean of their means is not the mean over all labels. Trainer
counts `labels != -100` over the whole step and passes the count as `num_items_in_batch`; a head must divide by it.

Question answering has no `labels` key: Trainer counts nothing, lets the head take its mean and divides that by the
number of micro-batches. What follows from that is tested at the end.
"""

import copy

import pytest
import torch
from reference import tiny_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from linformer_hf import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
)


ROWS = 8


class Rows(Dataset):
    """Row i is the i-th slice of every tensor."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in self.tensors.items()}


def rows_with(width: int = 20, choices: int | None = None, **labels) -> Rows:
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, width) if choices is None else (ROWS, choices, width)
    ids = torch.randint(1, 50, shape, generator=generator)
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        mask[row, ..., width - row :] = 0  # unequal lengths
    return Rows(input_ids=ids, attention_mask=mask, **labels)


def some_tokens(classes: int) -> torch.Tensor:
    """Labels [rows, N]: 1 in row 0, 2 in row 1, ..., 8 in row 7; -100 elsewhere."""
    labels = torch.full((ROWS, 20), -100)
    for row in range(ROWS):
        labels[row, 1 : row + 2] = (torch.arange(row + 1) * 7 + row) % classes
    return labels


# -100 in some rows: without it every micro-batch would hold two labels, and a mean of means would be right.
CLASSES = torch.tensor([0, -100, 1, 2, -100, -100, 2, 1])
CASES = {
    "MaskedLM": (LinformerForMaskedLM, {}, rows_with(labels=some_tokens(50))),
    "MaskedLM sparse": (LinformerForMaskedLM, {"sparse_prediction": True}, rows_with(labels=some_tokens(50))),
    "single label": (LinformerForSequenceClassification, {"num_labels": 3}, rows_with(labels=CLASSES)),
    "TokenClassification": (
        LinformerForTokenClassification,
        {"num_labels": 5},
        rows_with(labels=some_tokens(5)),
    ),
    "MultipleChoice": (
        LinformerForMultipleChoice,
        {},
        rows_with(choices=3, labels=CLASSES),
    ),
    # No number can mean "ignored" here, and every row has as many labels; only the last micro-batch is smaller.
    "regression": (
        LinformerForSequenceClassification,
        {"num_labels": 1},
        rows_with(labels=torch.linspace(-2, 3, ROWS)),
    ),
    "several regressions": (
        LinformerForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
        rows_with(labels=torch.linspace(-2, 3, ROWS * 3).view(ROWS, 3)),
    ),
    "multi label": (
        LinformerForSequenceClassification,
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        rows_with(labels=(torch.arange(ROWS * 3) % 2).float().view(ROWS, 3)),
    ),
}
ANSWERS = rows_with(start_positions=torch.arange(ROWS), end_positions=torch.arange(ROWS) + 3)
TRUNCATED = rows_with(  # 20 and beyond: the answer was cut off, and counts for nothing
    start_positions=torch.tensor([0, 25, 2, 3, 20, 30, 6, 7]), end_positions=torch.tensor([1, 26, 4, 25, 20, 31, 8, 9])
)


def trained(model, rows: Rows, batch: int, accumulation: int, folder) -> dict[str, torch.Tensor]:
    """The parameters after one epoch of `rows` in their order, with plain SGD and no dropout."""
    model = copy.deepcopy(model).train()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # clipping would hide a wrong scale
        optim="sgd",
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 1
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def quiet_model(head, **options):
    """No dropout, and moderate weights, so that rounding is not magnified."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    return tiny_model(head, **quiet, **options)


def assert_same_step(model, rows: Rows, cuts, folder) -> None:
    whole = trained(model, rows, ROWS, 1, folder)
    moved = max((whole[name] - parameter).abs().max() for name, parameter in model.named_parameters())
    assert moved > 1e-3  # there was a step at all
    for batch, accumulation in cuts:
        assert_same_parameters(trained(model, rows, batch, accumulation, folder), whole)


def assert_same_parameters(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in expected.items():
        torch.testing.assert_close(ours[name], parameter, atol=3e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_the_same_whole_and_in_unequal_parts(case, tmp_path):
    head, options, rows = CASES[case]
    assert_same_step(quiet_model(head, **options), rows, [(2, 4), (3, 3)], tmp_path)


def test_equal_parts_of_complete_answers_are_the_same_step(tmp_path):
    assert_same_step(quiet_model(LinformerForQuestionAnswering), ANSWERS, [(2, 4)], tmp_path)


def test_trainer_takes_the_mean_of_means_where_it_counts_nothing(tmp_path):
    """Question answering with truncated answers: Trainer knows of no labels, so every micro-batch weighs the same."""
    model = quiet_model(LinformerForQuestionAnswering)
    parts = trained(model, TRUNCATED, 2, 4, tmp_path)
    micro_batches = [{name: tensor[i : i + 2] for name, tensor in TRUNCATED.tensors.items()} for i in range(0, ROWS, 2)]
    (sum(model(**batch).loss for batch in micro_batches) / 4).backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in model.named_parameters()}
    assert_same_parameters(parts, expected)


def test_question_answering_is_exact_where_the_caller_counts():
    model = quiet_model(LinformerForQuestionAnswering)
    whole = model(**TRUNCATED.tensors, num_items_in_batch=6).loss
    parts = [
        model(**{name: tensor[i : i + 2] for name, tensor in TRUNCATED.tensors.items()}, num_items_in_batch=6).loss
        for i in range(0, ROWS, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert not torch.isclose(sum(parts), model(**TRUNCATED.tensors).loss)  # 6 starts and 5 ends are left of 8


@pytest.mark.parametrize("case", CASES)
def test_the_count_may_be_a_number_or_a_tensor(case):
    head, options, rows = CASES[case]
    model = quiet_model(head, **options).train()
    losses = [model(**rows.tensors, num_items_in_batch=count).loss for count in (5, torch.tensor(5), torch.tensor(10))]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], 2 * losses[2])
