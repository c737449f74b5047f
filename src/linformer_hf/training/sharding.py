"""Models whose weights are dealt out over the processes: FSDP2 and DeepSpeed, both through Trainer."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import PreTrainedModel, Trainer


# What a checkpoint of each has and no other: with it Trainer resumes under the same alone.
MARKS = {"FSDP": "pytorch_model_fsdp.bin", "DeepSpeed": "latest"}


def prepare(trainer: Trainer, checkpoint: Path | None) -> None:
    """Let FSDP wrap the model's layers, if the recipe does not say what else, and `ddp_timeout` count on CPUs.

    Args:
        checkpoint: that training goes on from.

    Raises:
        ValueError: each process would train alone; FSDP or DeepSpeed would not be used, or FSDP would write shards; the
            checkpoint was not written as the model is dealt out now.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > trainer.args.world_size:
        raise ValueError(
            f"{started} processes were started, but without an accelerator accelerate takes each for one alone: set "
            "training.use_cpu=true."
        )
    if trainer.args.use_cpu and torch.distributed.is_initialized():  # transformers passes it on elsewhere only
        torch.distributed.distributed_c10d._set_pg_timeout(trainer.args.ddp_timeout_delta)
    now = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
    for name, key in (("FSDP", "fsdp"), ("DeepSpeed", "deepspeed")):
        if getattr(trainer.args, key) and now != name:
            raise ValueError(
                f"training.{key}: accelerate shards no model on CPUs (it would train whole copies without a word). "
                f"Leave training.{key} out, or train on GPUs."
            )
    then = None if checkpoint is None else next((name for name, f in MARKS.items() if (checkpoint / f).exists()), None)
    if checkpoint is not None and now != then:
        how = f"under {then}" if then else "without FSDP or DeepSpeed"
        raise ValueError(
            f"{checkpoint} was written {how} and resumes so only. "
            f"Use the recipe that it was begun with, or begin another run with model.checkpoint={checkpoint}."
        )
    if now == "FSDP":
        plugin = trainer.accelerator.state.fsdp_plugin
        if "FULL" not in str(plugin.state_dict_type):
            raise ValueError(
                f"FSDP's {plugin.state_dict_type} leaves out configuration, tokenizer and whole weights. Set "
                "training.fsdp_config.state_dict_type (of accelerate launch: fsdp_state_dict_type) to FULL_STATE_DICT."
            )
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = layer_names(trainer.model)
        trainer.model.save_pretrained = partial(save_whole, trainer.model, type(trainer.model))


def save_whole(model: PreTrainedModel, kind: type, folder: str, state_dict: dict[str, Any], **options: Any) -> None:
    """Save gathered weights as the class `kind` that the model had before FSDP gave it one of torch's own module.

    Else that module's files would be saved as the model's code.
    """
    plain: Any = object.__new__(kind)
    plain.__dict__ = {name: value for name, value in model.__dict__.items() if name != "save_pretrained"}
    tied = model.all_tied_weights_keys  # gathered, they are no longer one tensor
    weights = {name: weight for name, weight in state_dict.items() if name not in tied}
    plain.save_pretrained(folder, state_dict=weights, **options)


def layer_names(model: PreTrainedModel) -> list[str]:
    """The classes that FSDP wraps: those that the model keeps whole, but for what holds the input embeddings.

    accelerate groups these with the words that are tied to them. By default it wraps them twice, which torch refuses.
    """
    words = model.get_input_embeddings()
    holds = {type(module).__name__: words in module.modules() for module in model.modules()}
    return [name for name in model._no_split_modules or () if holds.get(name) is False]
