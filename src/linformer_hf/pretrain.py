"""`linformer-hf pretrain RECIPE.yaml`: masked-language-model pretraining through Trainer.

A recipe has the sections `model` (LinformerConfig), `data` (PretrainingData) and `training` (TrainingArguments,
verbatim). The run leaves the model, its tokenizer and custom code, results.json, curve.png and README.md in
`training.output_dir`.
"""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from . import results
from .configuration_linformer import LinformerConfig
from .data.corpus import PreparedCorpus, PretrainingData, prepare
from .data.masking import MaskedDataset, pad_collate, unigram_baseline
from .modeling_linformer import LinformerForMaskedLM
from .recipe import RecipeError, load_recipe


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
    masked = prediction.label_ids != -100
    hits = prediction.predictions[masked] == prediction.label_ids[masked]
    return {"masked_accuracy": float(np.mean(hits)) if hits.size else float("nan"), "masked_tokens": int(hits.size)}


def pretrain(recipe_path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> Path:
    """Pretrain as the recipe says.

    Args:
        recipe_path: YAML file.
        overrides: `section.key=value`, applied over the file.
        resume: continue the last whole checkpoint in `training.output_dir`.

    Returns:
        The folder of the run.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        FileExistsError: the folder is not empty and `resume` is False.
        ValueError, FileNotFoundError, ConnectionError: the corpus cannot be read; the message says why.
    """
    started = time.time()
    recipe = load_recipe(
        recipe_path,
        overrides,
        {"model": LinformerConfig, "data": PretrainingData, "training": TrainingArguments},
    )
    data: PretrainingData = recipe.build("data")
    arguments: TrainingArguments = recipe.build("training")
    folder = results.open_run(arguments.output_dir, recipe.raw, resume)

    set_seed(arguments.seed)
    model_values = recipe.values("model")
    length = data.sequence_length or model_values.get("max_position_embeddings", LinformerConfig.max_position_embeddings)
    with arguments.main_process_first(desc="preparing the corpus"):
        corpus = prepare(data, length)
    model = LinformerForMaskedLM(build_config(model_values, corpus.tokenizer))
    trainer = build_trainer(model, arguments, data, corpus)

    checkpoint = results.last_whole_checkpoint(folder) if resume else None
    if resume:
        logger.warning("Resuming from %s.", checkpoint or "the beginning: there is no whole checkpoint yet")
    trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    evaluated = trainer.evaluate()
    results.save_final(trainer, folder)
    if trainer.is_world_process_zero():
        report(trainer, folder, recipe.raw, corpus, {**trained.metrics, **evaluated}, length, time.time() - started)
        print(f"Pretrained model, curve and {results.RESULTS_FILE}: {folder.resolve()}")
    return folder


def build_trainer(
    model: LinformerForMaskedLM, arguments: TrainingArguments, data: PretrainingData, corpus: PreparedCorpus
) -> Trainer:
    masking = {
        "seed": data.seed,
        "mlm_probability": data.mlm_probability,
        "mask_fractions": data.mask_fractions,
        "whole_word": data.whole_word_masking,
    }
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=MaskedDataset(corpus.train, corpus.tokenizer, **masking),
        eval_dataset=MaskedDataset(corpus.validation, corpus.tokenizer, static=True, **masking),
        data_collator=pad_collate(corpus.tokenizer),
        processing_class=corpus.tokenizer,
        preprocess_logits_for_metrics=keep_predictions,
        compute_metrics=masked_accuracy,
    )


def report(
    trainer: Trainer,
    folder: Path,
    recipe: dict[str, Any],
    corpus: PreparedCorpus,
    metrics: dict[str, float],
    length: int,
    seconds: float,
) -> None:
    """results.json, curve.png and README.md."""
    args, model = trainer.args, trainer.model
    baseline = unigram_baseline(corpus.train, trainer.eval_dataset, vocab_size=model.config.vocab_size)
    perplexity = math.exp(metrics["eval_loss"])
    steps = trainer.state.global_step
    tokens = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size * length
    content = {
        "verb": "pretrain",
        "recipe": recipe,
        **results.environment(args.seed, args.device, results.training_dtype(trainer)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": corpus.counts,
        "steps": steps,
        "metrics": {
            "validation_loss": metrics["eval_loss"],
            "validation_perplexity": perplexity,
            "validation_masked_accuracy": metrics["eval_masked_accuracy"],
            "validation_masked_tokens": metrics["eval_masked_tokens"],
            "validation_sequences": len(trainer.eval_dataset),
            "unigram_perplexity": baseline["perplexity"],
            "unigram_masked_accuracy": baseline["accuracy"],
            "perplexity_ratio": baseline["perplexity"] / perplexity,
        },
        **results.throughput(metrics, tokens, seconds),
        "peak_memory_mib": results.peak_memory_mib(args.device),
        "history": trainer.state.log_history,
    }
    title = f"Linformer, {content['parameters'] / 1e6:.1f} M parameters, N = {model.config.max_position_embeddings}"
    results.plot_curve(
        folder / results.CURVE_FILE, trainer.state.log_history, title, {"unigram baseline": baseline["loss"]}
    )
    results.write_text(folder / results.CARD_FILE, card(content, model.config, title))
    results.write_json(folder / results.RESULTS_FILE, content)


def card(content: dict[str, Any], config: LinformerConfig, title: str) -> str:
    metrics = content["metrics"]
    return results.model_card(
        title=title,
        summary=(
            f"A Linformer encoder ({config.num_hidden_layers} layers, {config.hidden_size} wide, "
            f"{config.num_attention_heads} heads; projection `{config.projection_type}`, sharing "
            f"`{config.projection_sharing}`, K = {config.projected_length}), pretrained as a masked language model for "
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
    )
