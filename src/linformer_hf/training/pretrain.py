"""`linformer-hf pretrain RECIPE.yaml`: masked-language-model pretraining through Trainer.

A recipe has the sections `model` (LinformerConfig, or a checkpoint to go on from), `data` (PretrainingData), `training`
(TrainingArguments, verbatim) and, if wanted, `stages` (shorter rows first). The run leaves the model, its tokenizer and
custom code, results.json, curve.png and README.md in
`training.output_dir`.
"""

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..configuration_linformer import LinformerConfig, checked
from ..data.corpus import PreparedCorpus, StreamedRows, prepare
from ..data.documents import PretrainingData
from ..data.masking import IGNORE, EpochCallback, MaskedDataset, MaskedStream, Masker, pad_collate, unigram_baseline
from ..data.tokenizer import load_tokenizer, stored
from ..hub.card import CardMetadata, metadata_of
from ..modeling_linformer import LinformerForMaskedLM
from ..utils.files import loading, read_json
from ..utils.processes import processes
from ..utils.recipe import Recipe, RecipeError, check_type, load_recipe
from ..utils.reporting import summary_table
from .agreement import check_rows
from .checkpoints import last_whole_checkpoint
from .run import (
    STAGE_FILE,
    Run,
    begin_run,
    last_evaluation,
    open_run,
    results,
    save_final,
    save_stage,
    train,
    write_results,
    writing,
)


logger = logging.getLogger(__name__)


def build_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> LinformerConfig:
    """The recipe's section `model`, with vocabulary size and special tokens from the tokenizer.

    Raises:
        RecipeError: `model.vocab_size` is smaller than the tokenizer's vocabulary.
    """
    size = len(tokenizer)
    if values.get("vocab_size", size) < size:
        raise RecipeError(
            f"model.vocab_size={values['vocab_size']} is smaller than the tokenizer's vocabulary of {size} tokens; "
            "leave it out to take the tokenizer's."
        )
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    return LinformerConfig(**{"vocab_size": size, **special, "eos_token_id": tokenizer.eos_token_id, **values})


def keep_predictions(logits: Any, labels: Any) -> Any:
    """Trainer would gather [rows, N, V] floats; the most likely token of each place is all that accuracy needs."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def masked_accuracy(prediction: Any) -> dict[str, float]:
    """Share of masked tokens that are predicted exactly, and how many there were."""
    masked = prediction.label_ids != IGNORE
    hits = prediction.predictions[masked] == prediction.label_ids[masked]
    return {"masked_accuracy": float(np.mean(hits)) if hits.size else float("nan"), "masked_tokens": int(hits.size)}


@checked
class ModelSection(LinformerConfig):
    """LinformerConfig, or a checkpoint to go on from; further keys then change its configuration.

    `attn_implementation` is what `from_pretrained` takes: `sdpa` (default), `eager`, or a flash one.
    """

    checkpoint: str | None = None
    attn_implementation: str | None = None


@dataclass
class Stage:
    """Training on shorter rows before the main run: most of BERT's own training was such a stage.

    Args:
        sequence_length: tokens in a row.
        training: TrainingArguments that differ from the section `training`; no evaluation unless they say so.
    """

    sequence_length: int
    training: dict[str, Any]


SECTIONS = {
    "model": ModelSection,
    "data": PretrainingData,
    "training": TrainingArguments,
    "stages": list[Stage],
    "card": CardMetadata,
}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A pretraining recipe, every section of it checked. Raises RecipeError."""
    recipe = load_recipe(path, overrides, sections=SECTIONS)
    for i, stage in enumerate(recipe.values_of_list("stages")):
        check_type(stage["training"], TrainingArguments, f"stages[{i}].training")
    if "checkpoint" not in recipe.values("model"):
        recipe.build("model")
    recipe.build("data")
    return recipe


@dataclass
class Leg:
    """One Trainer's worth of the run: a stage, or the main training at the end."""

    arguments: TrainingArguments
    length: int
    folder: Path


def plan(recipe: Recipe, folder: Path, main_length: int) -> list[Leg]:
    """The stages and the main training, in order."""
    legs = []
    for i, stage in enumerate(recipe.build("stages")):
        place = folder / f"stage-{i + 1}"
        changes = {"eval_strategy": "no", "load_best_model_at_end": False, **stage.training, "output_dir": str(place)}
        legs.append(Leg(recipe.build("training", **changes), stage.sequence_length, place))
        if stage.sequence_length > main_length:
            raise RecipeError(
                f"stages[{i}].sequence_length={stage.sequence_length} is longer than the main rows of {main_length}."
            )
    return [*legs, Leg(recipe.build("training"), main_length, folder)]


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LinformerForMaskedLM:
    """A model with random weights, or the checkpoint that `model.checkpoint` names."""
    values = recipe.values("model")
    checkpoint, attention = values.pop("checkpoint", None), values.get("attn_implementation")
    if checkpoint is None:
        values.pop("attn_implementation", None)
        return LinformerForMaskedLM._from_config(build_config(values, tokenizer), attn_implementation=attention)
    with loading(checkpoint):
        model = LinformerForMaskedLM.from_pretrained(checkpoint, use_safetensors=True, **values)
    if len(tokenizer) > model.config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens, the checkpoint {checkpoint!r} only {model.config.vocab_size}. "
            "Use the checkpoint's own tokenizer: leave data.tokenizer out."
        )
    return model


def pretrain(recipe_path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> Path:
    """Pretrain as the recipe says: a YAML file, with `section.key=value` applied over it.

    Args:
        resume: continue the last whole checkpoint in `training.output_dir`.

    Returns:
        The folder of the run.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        FileExistsError: the folder is not empty and `resume` is False.
        Interrupted: SIGTERM or Ctrl-C during training; a checkpoint has been written.
        FloatingPointError: the loss is not finite.
        ValueError, FileNotFoundError, ConnectionError: the corpus cannot be read; the message says why.
    """
    recipe = read_recipe(recipe_path, overrides)
    data: PretrainingData = recipe.build("data")
    values = recipe.values("model")
    if data.tokenizer is None and values.get("checkpoint"):
        data.tokenizer = values["checkpoint"]
    n = values.get("max_position_embeddings") or _checkpoint_length(values)
    length = data.sequence_length or n
    if length > n:
        raise RecipeError(
            f"data.sequence_length={length} is longer than the model reads (model.max_position_embeddings={n})."
        )
    if data.streaming:  # also in recipe.json: a resumed run must go on with as many
        data.readers = recipe.raw["data"]["readers"] = data.readers or places(recipe.values("training"))
    run = open_run("pretrain", recipe.values("training").get("output_dir"), recipe.raw, resume)
    legs = plan(recipe, run.folder, length)
    set_seed(legs[-1].arguments.seed)
    trainer, corpus, totals = train_legs(run, recipe, data, legs, n, resume)
    evaluated = last_evaluation(trainer) or trainer.evaluate()
    save_final(trainer, run.folder)
    if trainer.is_world_process_zero():
        with writing(run.folder):
            content = report(run, trainer, corpus, evaluated, totals)
        for leg in legs[:-1]:
            shutil.rmtree(leg.folder)
        run.tell(summary_table(content), "Pretrained model, curve")
    return run.folder


def train_legs(
    run: Run, recipe: Recipe, data: PretrainingData, legs: list[Leg], n: int, resume: bool
) -> tuple[Trainer, PreparedCorpus, dict[str, Any]]:
    """Train every leg that is not finished yet; `n` is the model's longest input.

    Returns:
        The main leg's trainer and corpus, and totals and log of all legs. `timed_tokens`: what the seconds are of.
    """
    model: LinformerForMaskedLM | None = None
    history: list[dict[str, Any]] = []
    totals = {"trained_tokens": 0, "steps": 0, "train_seconds": 0.0, "timed_tokens": 0, "skipped_steps": 0}
    begun_with = used_tokenizer(legs) if resume else None
    for leg in legs:
        with leg.arguments.main_process_first(desc="preparing the corpus"):
            corpus = prepare(data, leg.length)
            if begun_with and begun_with.get_vocab() != corpus.tokenizer.get_vocab():
                logger.warning("The tokenizer is not that of the interrupted run: taking that one's instead.")
                corpus = prepare(replace(data, tokenizer=stored(begun_with, data.cache_dir)), leg.length)
        check_rows(corpus=corpus.checksum)
        corpus.tokenizer.model_max_length = n
        if model is None:
            model = build_model(recipe, corpus.tokenizer)
        finished = leg.folder / STAGE_FILE
        if finished.exists():
            way_out = "Delete it, and --resume goes on from the stage's last checkpoint."
            record = read_json(finished, way_out, ("history", *totals))
            run.earlier = max(run.earlier, record.get("wall_seconds", 0.0))
        else:
            trainer = build_trainer(model, leg.arguments, data, corpus)
            begin_run(run)
            metrics = train(trainer, leg.folder, run, resume)
            record = {
                "history": trainer.state.log_history,
                "steps": trainer.state.global_step,
                "train_seconds": metrics["train_runtime"],
                "wall_seconds": run.seconds,
                "skipped_steps": metrics["skipped_steps"],
                "trained_tokens": trainer.state.global_step * tokens_of_a_step(trainer.args, leg.length),
                "timed_tokens": metrics["timed_steps"] * tokens_of_a_step(trainer.args, leg.length),
            }
            if leg is not legs[-1] and trainer.is_world_process_zero():
                save_stage(trainer, leg.folder, record)
            leg.arguments.distributed_state.wait_for_everyone()
        history += [{**row, "step": row["step"] + totals["steps"]} for row in record["history"]]
        totals = {key: total + record.get(key, 0) for key, total in totals.items()}
        if leg is not legs[-1]:  # a fresh object, as after a resume: Trainer has wrapped this one's forward
            attention = recipe.values("model").get("attn_implementation")
            with loading(str(leg.folder)):
                model = LinformerForMaskedLM.from_pretrained(leg.folder, attn_implementation=attention)
    return trainer, corpus, {**totals, "history": history}


def used_tokenizer(legs: list[Leg]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the interrupted run trained with; None if it had not come to a checkpoint.

    The cache may have lost that one (another machine, a damaged folder), and one trained anew by another version of the
    library may have other ids.
    """
    for leg in legs:
        place = leg.folder if (leg.folder / STAGE_FILE).exists() else last_whole_checkpoint(leg.folder)
        if place:
            return load_tokenizer(str(place))  # now: the checkpoint is removed when newer ones are written
    return None


def _checkpoint_length(values: dict[str, Any]) -> int:
    if values.get("checkpoint"):
        with loading(values["checkpoint"]):
            return LinformerConfig.from_pretrained(values["checkpoint"]).max_position_embeddings
    return LinformerConfig.max_position_embeddings


def tokens_of_a_step(args: TrainingArguments, length: int) -> int:
    """Of all processes, padding included."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size * length


def places(training: dict[str, Any], count: int | None = None) -> int:
    """How many read a stream, each of which must have a reader: processes, or their data loaders' workers.

    Args:
        training: the recipe's section, before TrainingArguments are made of it, for they open the processes' group.
        count: of the processes; default: as many as a launcher has started, this one among them.
    """
    return (count or processes()) * max(1, training.get("dataloader_num_workers") or 0)


def streamed(rows: StreamedRows, masker: Masker, arguments: TrainingArguments, readers: int) -> MaskedStream:
    """A stream's rows as this process trains on them; raises a RecipeError where that cannot be dealt out."""
    if arguments.max_steps <= 0:
        raise RecipeError("data.streaming has no known length: set training.max_steps.")
    settings, count, workers = arguments.accelerator_config, arguments.world_size, arguments.dataloader_num_workers
    if readers % (count * max(1, workers)):
        raise RecipeError(
            f"data.readers={readers} cannot be dealt out evenly to {count} processes with {max(1, workers)} data "
            f"loader's workers each: set it to a multiple of {count * max(1, workers)}, or start other numbers of them "
            "(training.dataloader_num_workers)."
        )
    for name, chosen in (
        ("auto_find_batch_size", arguments.auto_find_batch_size),  # it changes what a process takes at once
        ("accelerator_config.dispatch_batches", settings.dispatch_batches),  # batches are padded to different widths
        ("accelerator_config.split_batches", settings.split_batches),
    ):
        if chosen and count > 1:
            raise RecipeError(
                f"training.{name} does not go together with a stream, which is dealt out to {count} processes "
                "otherwise. Leave it out, or prepare the corpus (data.streaming=false)."
            )
    settings.dispatch_batches = False  # each process reads for itself
    return MaskedStream(rows, masker, readers, arguments.process_index, count, arguments.train_batch_size)


def build_trainer(
    model: LinformerForMaskedLM, arguments: TrainingArguments, data: PretrainingData, corpus: PreparedCorpus
) -> Trainer:
    def masker(probability: float) -> Masker:
        return Masker(corpus.tokenizer, data.seed, probability, data.mask_fractions, data.whole_word_masking)

    training = masker(data.mlm_probability)
    rows: MaskedDataset | MaskedStream
    callbacks: list[TrainerCallback] = []
    if data.streaming:
        rows = streamed(corpus.train, training, arguments, data.readers or 1)
    else:
        rows = MaskedDataset(corpus.train, training)
        callbacks.append(EpochCallback(rows))
    validation = masker(data.eval_mlm_probability or data.mlm_probability)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=MaskedDataset(corpus.validation, validation, static=True),
        data_collator=pad_collate(corpus.tokenizer),
        processing_class=corpus.tokenizer,
        preprocess_logits_for_metrics=keep_predictions,
        compute_metrics=masked_accuracy,
        callbacks=callbacks,
    )


def report(
    run: Run, trainer: Trainer, corpus: PreparedCorpus, metrics: dict[str, float], totals: dict[str, Any]
) -> dict[str, Any]:
    """Write results.json, curve.png and README.md; the first one's content."""
    evaluated: Any = trainer.eval_dataset
    baseline = unigram_baseline(corpus.token_counts, (evaluated[i] for i in range(len(evaluated))))
    perplexity = math.exp(metrics["eval_loss"])
    measured = {
        "validation_loss": metrics["eval_loss"],
        "validation_perplexity": perplexity,
        "validation_masked_accuracy": metrics["eval_masked_accuracy"],
        "validation_masked_tokens": metrics["eval_masked_tokens"],
        "validation_rows": len(evaluated),
        "unigram_perplexity": baseline["perplexity"],
        "unigram_masked_accuracy": baseline["accuracy"],
        "perplexity_ratio": baseline["perplexity"] / perplexity,
    }
    seconds, timed = totals["train_seconds"], totals.pop("timed_tokens")
    speed = timed / seconds if seconds else 0.0
    content = results(run, trainer, data=corpus.counts, metrics=measured, **totals, tokens_per_second=speed)
    config = trainer.model.config
    title = f"Linformer, {content['parameters'] / 1e6:.1f} M parameters, N = {config.max_position_embeddings}"
    content["card"] = card(content, config, title)
    write_results(run, content, title, {"unigram baseline": baseline["loss"]})
    return content


def card(content: dict[str, Any], config: LinformerConfig, title: str) -> dict[str, Any]:
    """What the model card says (see model_card)."""
    metrics = content["metrics"]
    sharing = f", sharing `{config.projection_sharing}`" if config.projection_sharing else ""
    band = f", of which {3 * config.local_window} are a band of single tokens" if config.local_window else ""
    measured = (("perplexity", "validation_perplexity"), ("accuracy", "validation_masked_accuracy"))
    return dict(
        title=title,
        summary=(
            f"A Linformer encoder ({config.num_hidden_layers} layers, {config.hidden_size} wide, "
            f"{config.num_attention_heads} heads; projection `{config.projection_type}`{sharing}, "
            f"K = {config.projected_length}{band}), pretrained as a masked language model for "
            f"{content['steps']:,} steps on {content['trained_tokens']:,} tokens."
        ),
        metrics={
            "validation perplexity": metrics["validation_perplexity"],
            "perplexity of the unigram baseline, same masks": metrics["unigram_perplexity"],
            "masked tokens predicted exactly": metrics["validation_masked_accuracy"],
            "the unigram baseline's share": metrics["unigram_masked_accuracy"],
            "masked tokens evaluated": metrics["validation_masked_tokens"],
            "tokens per second": content["tokens_per_second"],
            "wall time, s": content["wall_seconds"],
            "peak memory, MiB": content["peak_memory_mib"],
        },
        notes="Validation documents were held out whole; no training line comes from them.",
        limits=(
            "It knows what its corpus says and no more. It has not been tested for bias or safety; do not use it for "
            "decisions about people."
        ),
        auto_class="AutoModelForMaskedLM",
        pipeline_tag="fill-mask",
        evaluated=[
            {"dataset": corpus_name(content["recipe"]["data"]), "split": "held-out documents"}
            | {"metric": metric, "value": metrics[name]}
            for metric, name in measured
        ],
        **metadata_of(content["recipe"]),
    )


def corpus_name(data: dict[str, Any]) -> str:
    """What a recipe's sources are called."""
    named = [source.get("name") or Path(source["path"]).name for source in data["sources"] if len(source) > 1]
    return " + ".join(named) or data["sources"][0]["kind"]
