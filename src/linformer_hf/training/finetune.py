"""`linformer-hf finetune RECIPE.yaml`: every head of the family through Trainer, and sentence encoders through
sentence-transformers'.

A recipe has the sections `model` (FinetuneModel), `data` (TaskData), `training` (TrainingArguments, verbatim) and, for
a sentence encoder, `pairs` (pairs.Pairs). The validation slice guides the training; the test rows are read once, at
the end, and are what results.json reports.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..data.metrics import ERRORS, SEQEVAL, build_compute_metrics
from ..data.task_sources import load_task
from ..data.tasks import KINDS, OF_VECTORS, Kind, LoadedTask, TaskData, tokenize_task
from ..embedding.encoder import positions_of
from ..hub import sentence_head
from ..hub.card import CardMetadata, metadata_of
from ..utils.files import loading
from ..utils.places import own_name
from ..utils.recipe import load_recipe
from ..utils.reporting import summary_table
from . import pairs
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

    def source(self) -> dict[str, Any]:
        """What `from_pretrained` is told of where the checkpoint comes from."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def of_classifiers(self) -> list[str]:
        """Names of the fields that are set and that only a model with a classifier has a use for."""
        names = ("random_weights", "new_classifier", "classifier_dropout", "classifier_pooling")
        return [name for name in names if getattr(self, name)]


SECTIONS = {
    "model": FinetuneModel,
    "data": TaskData,
    "training": TrainingArguments,
    "pairs": pairs.Pairs,
    "card": CardMetadata,
}


read_recipe = partial(load_recipe, sections=SECTIONS, built=("model", "data", "pairs"))


def load_model(model: FinetuneModel, task: LoadedTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint (or its architecture with random weights) with a head for the task, and its tokenizer.

    Where both have the same classes, the task takes the checkpoint's order of them (`LoadedTask.take_order`).
    """
    source = model.source()
    tokenizer = AutoTokenizer.from_pretrained(model.checkpoint, **source)
    before = AutoConfig.from_pretrained(model.checkpoint, **source)
    names = [str(before.id2label[i]) for i in sorted(before.id2label)]
    kind = KINDS[task.kind]
    head: dict[str, Any] = dict(kind.fields)
    if task.label_names is None:
        one = task.kind == "regression" and len(names) == 1
        same = one or any(name.endswith(kind.head) for name in before.architectures or ())
    else:
        same = task.take_order(names)
        head["id2label"] = dict(enumerate(task.label_names))
        head["label2id"] = {name: i for i, name in enumerate(task.label_names)}
    config = AutoConfig.from_pretrained(model.checkpoint, **source, **head, **model.overrides())
    config.metric = next(iter(task.metrics), None)  # what judges it; transformers has no field for that
    attention = model.attn_implementation
    auto_class = getattr(transformers, f"AutoModel{kind.head}")
    if model.random_weights:
        trusted = {"trust_remote_code": model.trust_remote_code, "attn_implementation": attention}
        return auto_class.from_config(config, **trusted), tokenizer
    loaded, info = auto_class.from_pretrained(
        model.checkpoint,
        config=config,
        attn_implementation=attention,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # judged below
        output_loading_info=True,
        **source,
    )
    ours = task.label_names or ["a number" if task.kind == "regression" else task.kind]
    settle_classifier(loaded, info, names, ours, same and not model.new_classifier, model)
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
    data: TaskData = recipe.build("data")
    run = open_run("finetune", recipe.values("training").get("output_dir"), recipe.raw, resume)
    arguments = pairs.training_arguments(recipe) if data.of_vectors else recipe.build("training")
    settle_best(arguments, recipe.values("training"))

    set_seed(arguments.seed)
    with arguments.main_process_first(desc="preparing the task"):
        task, model, tokenizer, splits = prepare(data, recipe.build("model"), recipe.build("pairs"), arguments)
    check_rows(**splits)
    complete = partial(pairs.complete, model.max_seq_length) if data.of_vectors else lambda _: None
    trainer = build_trainer(task, model, tokenizer, splits, recipe.build("pairs"), arguments)

    judge = partial(_judged_by, trainer, task, splits)
    begin_run(run)
    judge("validation")
    trained = train(trainer, run.folder, run, resume)
    measured = trainer.evaluate(judge("validation"))
    for split in splits:
        if split.startswith("test"):
            measured |= trainer.evaluate(judge(split), metric_key_prefix=split)
    save_final(trainer, run.folder, complete)
    if trainer.is_world_process_zero():
        with writing(run.folder):
            content = report(run, trainer, task, {**trained, **measured})
        run.tell(summary_table(content), "Fine-tuned model, curve")
    return run.folder


def prepare(
    data: TaskData, section: FinetuneModel, pairing: pairs.Pairs, arguments: TrainingArguments
) -> tuple[LoadedTask, Any, PreTrainedTokenizerBase, dict[str, Dataset]]:
    """The task, the model with its head, or the sentence encoder, its tokenizer, and the splits as it reads them."""
    task = load_task(data)
    _check(task, section, arguments, data.stride is not None)
    pairing = pairing.for_kind(task.kind)
    if task.kind in OF_VECTORS:
        model: Any = pairs.load_encoder(
            section.checkpoint,
            pairing,
            section.overrides(),
            section.attn_implementation,
            **section.source(),
        )
        model[0].config.metric = task.metrics[0]
        tokenizer, usual, limit = model.tokenizer, model.max_seq_length, positions_of(model[0].model)
    else:
        with loading(section.checkpoint):
            model, tokenizer = load_model(section, task)
        usual = limit = positions_of(model)
    if limit is not None and data.max_length is not None and data.max_length > limit:
        raise ValueError(
            f"data.max_length={data.max_length} is longer than the checkpoint reads "
            f"({limit} tokens). Lower it, or resize the checkpoint's positions first."
        )
    max_length = data.max_length or min(filter(None, (task.max_length, usual)), default=None)
    splits = tokenize_task(task, tokenizer, max_length, data.stride)
    if told := truncation(task.counts):
        logger.warning("%s", told)
    return task, model, tokenizer, pairs.in_order(splits) if task.kind in OF_VECTORS else splits


def build_trainer(
    task: LoadedTask,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Dataset],
    pairing: pairs.Pairs,
    arguments: TrainingArguments,
) -> Trainer:
    """Trainer, or sentence-transformers' for a sentence encoder."""
    collator = KINDS[task.kind].collator
    if collator is None:
        return pairs.build_trainer(model, arguments, task, splits, pairing.for_kind(task.kind))
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
    )


def settle_best(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Of an error the lowest is the best, unless the recipe says otherwise. Trainer knows that of losses alone."""
    judge = (arguments.metric_for_best_model or "").removeprefix("eval_")
    if judge in ERRORS and given.get("greater_is_better") is None:
        arguments.greater_is_better = False


def _judged_by(trainer: Trainer, task: LoadedTask, splits: Mapping[str, Dataset], split: str) -> Dataset:
    """The rows of a split, by which the trainer judges from now on."""
    if task.kind in OF_VECTORS:
        trainer.evaluator = pairs.judge(task, splits[split], trainer.args.per_device_eval_batch_size)
        return splits[split]
    rows, pieces = task.splits[split], task.pieces.get(split)
    read = rows if pieces is None else rows.select(pieces)
    asked = concatenate_datasets([read, splits[split]], axis=1) if task.kind == "question-answering" else None
    names = task.label_names or ()
    trainer.compute_metrics = build_compute_metrics(task.kind, task.metrics, names, task.positive, asked, pieces)
    return splits[split]


def _check(task: LoadedTask, section: FinetuneModel, arguments: TrainingArguments, strided: bool) -> None:
    """Raise a ValueError for what would have no effect, or would fail, or be wrong, after the training."""
    if task.kind in OF_VECTORS and (useless := section.of_classifiers()):
        raise ValueError(
            f"model.{', model.'.join(useless)} would have no effect with data.kind={task.kind}, which trains the "
            "checkpoint's own weights and no classifier. Leave it out."
        )
    if {*SEQEVAL} & {*task.metrics} and task.kind == "token-classification" and not importlib.util.find_spec("seqeval"):
        raise ValueError(
            "entities are counted by seqeval: pip install 'linformer_hf[tagging]', or set metrics: [accuracy]."
        )
    together = (
        "answers and questions" if task.kind == "question-answering" else "the pieces of a row" if strided else ""
    )
    if together and arguments.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "training.train_sampling_strategy: group_by_length changes the order of test rows too, by which "
            f"{together} belong together. Leave it out."
        )


def truncation(counts: Mapping[str, Any]) -> str:
    """In one line: how many rows of which split lost how many tokens; nothing if none did."""
    cut = [
        f"{counts[f'{split}_truncated_rows']:,} of {counts[f'{split}_rows']:,} {split.replace('_', ' ')} rows "
        f"({tokens:,} tokens)"
        for name, tokens in counts.items()
        if tokens and (split := name.removesuffix("_truncated_tokens")) != name
    ]
    return f"max_length={counts['max_length']:,} cuts off the end of {', '.join(cut)}." if cut else ""


def reading(content: Mapping[str, Any]) -> str:
    """How long rows were read, where they were not read whole."""
    counts, stride = content["data"], content["recipe"]["data"].get("stride")
    if stride is None:
        return truncation(counts)
    return (
        f"Rows were read in pieces of at most {counts['max_length']:,} tokens ({stride:,} of them shared with the "
        f"piece in front) and judged whole: {counts['test_rows']:,} test rows in {counts['test_pieces']:,} pieces. "
        "Of a longer text a pipeline that reads one such piece gives another answer."
    )


def report(run: Run, trainer: Trainer, task: LoadedTask, measured: dict[str, float]) -> dict[str, Any]:
    """Write results.json, curve.png and README.md; the first one's content."""
    metrics: dict[str, Any] = {}
    for split, rows in task.splits.items():
        if split != "train":
            prefix = "eval" if split == "validation" else split
            metrics |= {f"{split}_{name}": measured[f"{prefix}_{name}"] for name in task.metrics}
            metrics[f"{split}_rows"] = len(rows)
    # The test first: it is what the model is judged by.
    metrics = dict(sorted(metrics.items(), key=lambda item: not item[0].startswith("test")))
    content = results(
        run,
        trainer,
        task=task.name,
        data=task.counts,
        metrics=metrics,
        baselines=task.baselines,
        train_seconds=measured["train_runtime"],
        skipped_steps=measured["skipped_steps"],
        train_rows_per_second=measured["train_samples_per_second"],
    )
    start = "random weights" if run.recipe["model"].get("random_weights") else "pretrained weights"
    title = f"{task.name}, from {start}"
    head = sentence_head.read(run.folder) if task.kind in OF_VECTORS else None
    content["card"] = card(content, title, KINDS[task.kind]) | ({"sentence": head.facts} if head else {})
    write_results(run, content, title)
    return content


def card(content: dict[str, Any], title: str, kind: Kind) -> dict[str, Any]:
    """What the model card says (see model_card)."""
    metrics, task = content["metrics"], content["task"]
    rows = {name.replace("_", " "): value for name, value in metrics.items()}
    rows |= {f"baseline: {name.replace('_', ' ')}": value for name, value in content["baselines"].items()}
    rows |= {"wall time, s": content["wall_seconds"], "peak memory, MiB": content["peak_memory_mib"]}
    evaluated = [
        {"dataset": task, "split": "test", "metric": name.removeprefix("test_"), "value": value}
        for name, value in metrics.items()
        if name.startswith("test_") and not name.endswith("_rows")
    ]
    return dict(
        title=title,
        summary=(
            f"`{own_name(content['recipe']['model']['checkpoint'])}` fine-tuned on `{task}` for {content['steps']:,} "
            "steps."
        ),
        metrics=rows,
        notes=" ".join(filter(None, ["The test rows were read once, after training.", reading(content)])),
        limits=(
            "It has learned this task from these rows and no other. It has not been tested for bias or safety; do not "
            "use it for decisions about people."
        ),
        auto_class=f"AutoModel{kind.head}",
        pipeline_tag=kind.pipeline_tag,
        evaluated=evaluated,
        **metadata_of(content["recipe"]),
    )
