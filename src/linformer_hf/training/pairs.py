"""Pairs of texts for `linformer-hf finetune`: a sentence encoder, through sentence-transformers' trainer and losses.

That library is an extra, so it is imported where it is used. What it leaves in a folder is written in the form of
`sentence_head`, which every version of it and other servers read.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from ..data.metrics import METRICS
from ..data.tasks import OF_VECTORS, LoadedTask
from ..embedding.encoder import DOCUMENT_PROMPTS, check_weights
from ..hub import sentence_head
from ..utils.files import loading
from ..utils.recipe import Recipe


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

ORDER = ("text", "pair", "negative", "label")
MOST_SCORES = 10**8  # cosines that are held at a time when every anchor looks for its positive


@dataclass
class Pairs:
    """Section `pairs` of a fine-tuning recipe, for `data.kind` pairs and similarity.

    Args:
        loss: ranking (an anchor finds its positive among all positives and negatives of the batch), cosent (of two
            pairs, the one with the higher score has the higher cosine) or cosine (the cosine is the score). By default
            ranking for pairs, cosent for similarity.
        scale: of the cosines in ranking and cosent; 20 is a temperature of 0.05.
        mini_batch_size: rows that are read at a time with ranking: all of the batch compete, with equal gradients, in
            the memory of so many. By default all rows of the batch.
        pooling: makes the vector of the tokens' states where the checkpoint has no sentence head; by default the mean.
    """

    loss: Literal["ranking", "cosent", "cosine"] | None = None
    scale: float = 20.0
    mini_batch_size: int | None = None
    pooling: Literal["mean", "cls", "max"] | None = None

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale}.")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, got {self.mini_batch_size}.")

    def for_kind(self, kind: str) -> "Pairs":
        """The section with the kind's own loss where none is named. Raises a ValueError for what does not fit."""
        if kind not in OF_VECTORS:
            if self != Pairs():
                raise ValueError(f"section pairs would have no effect with data.kind={kind}. Leave it out.")
            return self
        loss = self.loss or ("ranking" if kind == "pairs" else "cosent")
        if (loss == "ranking") != (kind == "pairs"):
            fitting = "ranking" if kind == "pairs" else "cosent or cosine"
            other = "similarity, for rows with a score" if kind == "pairs" else "pairs, for rows without a score"
            raise ValueError(f"pairs.loss={loss} is none of data.kind={kind}: set {fitting}, or data.kind={other}.")
        if self.mini_batch_size is not None and loss != "ranking":
            raise ValueError("pairs.mini_batch_size would have no effect: it belongs to pairs.loss=ranking.")
        return replace(self, loss=loss)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The section `training`, as sentence-transformers' trainer takes it.

    Raises:
        ImportError: sentence-transformers is not installed.
        RecipeError: the section is refused.
        ValueError: it asks for what a sentence encoder is not trained with.
    """
    try:
        from sentence_transformers import SentenceTransformerTrainingArguments
    except ImportError as error:
        raise ImportError(
            f"pairs of texts need sentence-transformers ({error}): pip install 'linformer_hf[ecosystem]'."
        ) from error
    for name in ("fsdp", "deepspeed"):
        if recipe.values("training").get(name):
            raise ValueError(f"training.{name}: each process trains a sentence encoder whole. Leave it out.")
    ours = replace(recipe, types={**recipe.types, "training": SentenceTransformerTrainingArguments})
    # Two rows with one text would be each other's wrong answers.
    arguments = ours.build("training", batch_sampler="no_duplicates")
    if arguments.per_device_train_batch_size < 2:
        raise ValueError(
            "the rows of a batch are compared: training.per_device_train_batch_size must be at least 2, "
            f"got {arguments.per_device_train_batch_size}."
        )
    return arguments


def load_encoder(
    checkpoint: str, section: Pairs, overrides: Mapping[str, Any], attention: str | None, **source: Any
) -> "SentenceTransformer":
    """A folder or a Hub name with its sentence head, or with a pooling where it has none (told in the log).

    Args:
        overrides: fields of the encoder's configuration.
        attention: attn_implementation, as in `from_pretrained`.
        source: revision and trust_remote_code.

    Raises:
        ValueError: the checkpoint cannot be loaded, or has a head and `section` names a pooling.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    options |= {"attn_implementation": attention} if attention else {}
    with loading(checkpoint):
        head = sentence_head.read(checkpoint, source["revision"])
        if head is not None and section.pooling:
            raise ValueError(f"it has a sentence head of its own ({head}): leave pairs.pooling out")
        without_pooler = check_weights(checkpoint, **options, **source)
        model = SentenceTransformer(checkpoint, model_kwargs=options, config_kwargs=dict(overrides), **source)
    encoder: Any = model[0]
    if without_pooler:  # its numbers would be drawn at random, and be saved as if they had been trained
        encoder.model.pooler = None
    if head is None:
        mode = section.pooling or "mean"
        model[1] = Pooling(encoder.get_embedding_dimension(), mode)
        logger.warning(
            "%s has no sentence head: its vectors are made of its tokens' states by %s pooling.", checkpoint, mode
        )
    # The card is ours, and written at the end of the run.
    model.save_pretrained = partial(model.save_pretrained, create_model_card=False)  # type: ignore[method-assign]
    return model


def in_order(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The splits with their columns in the order by which the losses tell them apart."""
    return {
        split: rows.select_columns([name for name in ORDER if name in rows.features]) for split, rows in splits.items()
    }


def build_trainer(
    model: "SentenceTransformer", arguments: Any, task: LoadedTask, splits: Mapping[str, Dataset], section: Pairs
) -> Trainer:
    """sentence-transformers' trainer with the section's loss, which puts the model's own prompts before the texts.

    From here on the model cuts texts where the task does.
    """
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer import losses

    loss: Callable[..., Any] = {"cosent": losses.CoSENTLoss, "cosine": losses.CosineSimilarityLoss}.get(
        str(section.loss), losses.MultipleNegativesRankingLoss
    )
    options: dict[str, Any] = {} if section.loss == "cosine" else {"scale": section.scale}
    if section.mini_batch_size is not None:
        loss = losses.CachedMultipleNegativesRankingLoss
        options["mini_batch_size"] = section.mini_batch_size
    arguments.prompts = prompts(model, task.kind) or None
    model.max_seq_length = task.counts["max_length"]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        loss=loss(model, **options),
    )
    trainer.remove_callback(trainer.model_card_callback_class)
    return trainer


def prompts(model: "SentenceTransformer", kind: str) -> dict[str, str]:
    """Column -> what `encode_query`, `encode_document` and `encode` put before its texts, where that is anything."""
    usual = model.prompts.get(model.default_prompt_name or "", "")
    found = {"text": usual, "pair": usual}
    if kind == "pairs":
        document = next((model.prompts[name] for name in DOCUMENT_PROMPTS if name in model.prompts), usual)
        found = {"text": model.prompts.get("query", usual), "pair": document, "negative": document}
    return {column: text for column, text in found.items() if text}


def judge(task: LoadedTask, rows: Dataset, batch_size: int) -> Callable[..., dict[str, float]]:
    """An evaluator for the trainer: the task's metrics of `rows` by sentence-transformers' own evaluators.

    For pairs, each anchor is looked for among all positives and negatives of the rows, each text once.
    """
    from sentence_transformers.sentence_transformer import evaluation

    options: dict[str, Any] = {"batch_size": batch_size, "write_csv": False}
    columns = {name: list(rows[name]) for name in rows.column_names}
    evaluators: list[Callable[..., dict[str, float]]] = []
    if task.kind == "similarity":
        sides = columns["text"], columns["pair"], columns["label"]
        evaluators.append(evaluation.EmbeddingSimilarityEvaluator(*sides, **options))
    elif {*task.metrics} - {"triplet_accuracy"}:
        texts = dict.fromkeys([*columns["pair"], *columns.get("negative", ())])
        number = {text: str(place) for place, text in enumerate(texts)}
        right: dict[str, set[str]] = {}
        for anchor, positive in zip(columns["text"], columns["pair"], strict=True):
            right.setdefault(anchor, set()).add(number[positive])
        queries: dict[str, Any] = {str(place): anchor for place, anchor in enumerate(right)}
        relevant = {place: right[anchor] for place, anchor in queries.items()}
        corpus: dict[str, Any] = {place: text for text, place in number.items()}
        options["corpus_chunk_size"] = max(1, MOST_SCORES // len(queries))
        evaluators.append(evaluation.InformationRetrievalEvaluator(queries, corpus, relevant, **options))
        options.pop("corpus_chunk_size")
    if "triplet_accuracy" in task.metrics:
        sides = columns["text"], columns["pair"], columns["negative"]
        evaluators.append(evaluation.TripletEvaluator(*sides, **options))

    def evaluate(model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1) -> dict[str, float]:
        found: dict[str, float] = {}
        for evaluator in evaluators:
            found |= evaluator(model)
        return {name: _of(found, METRICS[task.kind][name]) for name in task.metrics}

    return evaluate


def _of(found: Mapping[str, float], part: str) -> float:
    """The number whose key begins or ends with `part`; 0 of a correlation with what is constant."""
    value = float(next(value for key, value in found.items() if key.startswith(part) or key.endswith(part)))
    return 0.0 if math.isnan(value) else value


def complete(length: int | None, beside: Path) -> None:
    """Write the sentence head that sentence-transformers has saved in the form of every other folder of ours.

    Args:
        length: at how many tokens the folder cuts texts, whatever it was trained with.
        beside: the folder in that of the run.
    """
    head = sentence_head.read(beside)
    assert head is not None
    head.write(beside, length)
    with contextlib.suppress(OSError):
        (beside.parent / "eval").rmdir()  # the trainer's place for tables of its evaluators, which write none here
