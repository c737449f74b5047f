"""`linformer-hf finetune RECIPE.yaml`: sequence classification through Trainer.

A recipe has the sections `model` (FinetuneModel), `data` (TaskData) and `training` (TrainingArguments, verbatim). The
validation slice guides the training; the test rows are read once, at the end, and are what results.json reports.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..data.metrics import build_compute_metrics
from ..data.task_sources import load_task
from ..data.tasks import LoadedTask, TaskData, tokenize_task
from ..hub.card import CardMetadata, metadata_of
from ..recipe import load_recipe
from ..utils.files import loading
from ..utils.places import own_name
from ..utils.runs import summary_table
from .agreement import check_rows
from .run import Run, begin_run, open_run, results, save_final, train, write_results, writing


logger = logging.getLogger(__name__)


@dataclass
class FinetuneModel:
    """Section `model` of a fine-tuning recipe.

    Args:
        checkpoint: folder or Hub name of a pretrained encoder (a Linformer, or any other with such a head).
        random_weights: take only the checkpoint's configuration and tokenizer, to see what pretraining gains.
        new_classifier: begin with a new classifier. Without it the checkpoint's own is kept where the task has the same
            classes, in the checkpoint's order, and replaced where it has as many others.
        revision: commit, branch or tag of a Hub repository.
        attn_implementation: as in `from_pretrained`.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout, classifier_pooling: override the
            checkpoint's configuration where given.
        trust_remote_code: run the modelling code that a checkpoint brings. Not needed for Linformers.
    """

    checkpoint: str
    random_weights: bool = False
    new_classifier: bool = False
    revision: str | None = None
    hidden_dropout_prob: float | None = None
    attention_probs_dropout_prob: float | None = None
    classifier_dropout: float | None = None
    classifier_pooling: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def overrides(self) -> dict[str, Any]:
        """Configuration fields that the recipe sets."""
        fields = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "classifier_pooling")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}


SECTIONS = {"model": FinetuneModel, "data": TaskData, "training": TrainingArguments, "card": CardMetadata}


read_recipe = partial(load_recipe, sections=SECTIONS, built=("model", "data"))


def load_model(model: FinetuneModel, task: LoadedTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint (or its architecture with random weights) with a head for the task, and its tokenizer.

    Where both have the same classes, the task takes the checkpoint's order of them (`LoadedTask.take_order`).
    """
    source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model.checkpoint, **source)
    id2label = AutoConfig.from_pretrained(model.checkpoint, **source).id2label
    names = [str(id2label[i]) for i in sorted(id2label)]
    if task.label_names is None:
        same = len(names) == 1
        head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    else:
        same = task.take_order(names)
        head = {
            "id2label": dict(enumerate(task.label_names)),
            "label2id": {name: i for i, name in enumerate(task.label_names)},
            "problem_type": "single_label_classification",
        }
    config = AutoConfig.from_pretrained(model.checkpoint, **source, **head, **model.overrides())
    attention = model.attn_implementation
    if model.random_weights:
        trusted = {"trust_remote_code": model.trust_remote_code, "attn_implementation": attention}
        return AutoModelForSequenceClassification.from_config(config, **trusted), tokenizer
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        model.checkpoint,
        config=config,
        attn_implementation=attention,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # judged below
        output_loading_info=True,
        **source,
    )
    settle_classifier(loaded, info, names, task.label_names or ["a number"], same and not model.new_classifier, model)
    return loaded, tokenizer


def settle_classifier(
    loaded: PreTrainedModel, info: dict[str, Any], theirs: list[str], ours: list[str], keep: bool, model: FinetuneModel
) -> None:
    """Keep the checkpoint's classifier, or replace it and say so.

    Raises:
        ValueError: it is for another number of classes, and a new one is not asked for; or other weights do not fit.
    """
    body = f"{loaded.base_model_prefix}."
    heads = [item for item in loaded.named_modules() if isinstance(item[1], nn.Linear) and not item[0].startswith(body)]
    title, classifier = heads[-1]  # a dense layer before it is no classifier
    keys = {f"{title}.{name}" for name, _ in classifier.named_parameters()}
    shapes = {key: shape for key, shape, _ in info["mismatched_keys"]}
    others = sorted(shapes.keys() - keys)
    if others:
        raise ValueError(f"weights have another shape than its configuration says: {', '.join(others[:4])}")
    known = f"{', '.join(theirs[:4])}{', ...' if len(theirs) > 4 else ''}"
    wanted = f"{', '.join(ours[:4])}{', ...' if len(ours) > 4 else ''}"
    if shapes and not model.new_classifier:
        count = next(iter(shapes.values()))[0]
        raise ValueError(
            f"its classifier is for {count} classes ({known}), the task has {len(ours)} ({wanted}). Set "
            "model.new_classifier=true to begin with a new one over the same encoder."
        )
    if keep or info["missing_keys"] & keys:
        return
    for parameter in classifier.parameters():
        parameter._is_hf_initialized = False
    loaded._init_weights(classifier)
    logger.warning("A new classifier replaces the checkpoint's: its classes are %s, the task's %s.", known, wanted)


def finetune(recipe_path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> Path:
    """Fine-tune and test as the recipe says: a YAML file, with `section.key=value` applied over it.

    Args:
        resume: continue the last whole checkpoint in `training.output_dir`.

    Returns:
        The folder of the run.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        FileExistsError: the folder is not empty and `resume` is False.
        Interrupted: SIGTERM or Ctrl-C during training; a checkpoint has been written.
        FloatingPointError: the loss is not finite.
        ValueError, FileNotFoundError, ConnectionError: the task or the checkpoint cannot be read; the message says why.
    """
    recipe = read_recipe(recipe_path, overrides)
    model_section: FinetuneModel = recipe.build("model")
    data: TaskData = recipe.build("data")
    run = open_run("finetune", recipe.values("training").get("output_dir"), recipe.raw, resume)
    arguments: TrainingArguments = recipe.build("training")

    set_seed(arguments.seed)
    with arguments.main_process_first(desc="preparing the task"):
        task = load_task(data)
        with loading(model_section.checkpoint):
            model, tokenizer = load_model(model_section, task)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and data.max_length is not None and data.max_length > limit:
            raise ValueError(
                f"data.max_length={data.max_length} is longer than the checkpoint reads "
                f"(max_position_embeddings={limit}). Lower it, or resize the checkpoint's positions first."
            )
        max_length = data.max_length or min(filter(None, (task.max_length, limit)), default=None)
        splits = tokenize_task(task, tokenizer, max_length)
    check_rows(**splits)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=build_compute_metrics(task.metrics, task.positive),
    )
    begin_run(run)
    trained = train(trainer, run.folder, run, resume)
    validated = trainer.evaluate(splits["validation"])
    tested = trainer.evaluate(splits["test"], metric_key_prefix="test")
    save_final(trainer, run.folder)
    if trainer.is_world_process_zero():
        with writing(run.folder):
            content = report(run, trainer, task, {**trained, **validated, **tested})
        run.tell(summary_table(content), "Fine-tuned model, curve")
    return run.folder


def report(run: Run, trainer: Trainer, task: LoadedTask, metrics: dict[str, float]) -> dict[str, Any]:
    """Write results.json, curve.png and README.md; the first one's content."""
    content = results(
        run,
        trainer,
        task=task.name,
        data=task.counts,
        metrics={
            **{f"test_{name}": metrics[f"test_{name}"] for name in task.metrics},
            "test_rows": len(task.test),
            **{f"validation_{name}": metrics[f"eval_{name}"] for name in task.metrics},
            "validation_rows": len(task.validation),
        },
        baselines=task.baselines,
        train_seconds=metrics["train_runtime"],
        skipped_steps=metrics["skipped_steps"],
        train_rows_per_second=metrics["train_samples_per_second"],
    )
    start = "random weights" if run.recipe["model"].get("random_weights") else "pretrained weights"
    title = f"{task.name}, from {start}"
    content["card"] = card(content, title)
    write_results(run, content, title)
    return content


def card(content: dict[str, Any], title: str) -> dict[str, Any]:
    """What the model card says (see model_card)."""
    metrics, task = content["metrics"], content["task"]
    rows = {name.replace("_", " "): value for name, value in metrics.items()}
    rows |= {f"baseline: {name.replace('_', ' ')}": value for name, value in content["baselines"].items()}
    rows |= {"wall time, s": content["wall_seconds"], "peak memory, MiB": content["peak_memory_mib"]}
    evaluated = [
        {"dataset": task, "split": "test", "metric": name.removeprefix("test_"), "value": value}
        for name, value in metrics.items()
        if name.startswith("test_") and name != "test_rows"
    ]
    return dict(
        title=title,
        summary=(
            f"`{own_name(content['recipe']['model']['checkpoint'])}` fine-tuned on `{task}` for {content['steps']:,} "
            "steps."
        ),
        metrics=rows,
        notes="The test rows were read once, after training; validation is a part of the training rows.",
        limits=(
            "It has learned this task from these rows and no other. It has not been tested for bias or safety; do not "
            "use it for decisions about people."
        ),
        auto_class="AutoModelForSequenceClassification",
        pipeline_tag="text-classification",
        evaluated=evaluated,
        **metadata_of(content["recipe"]),
    )
