"""Linformer for Hugging Face Transformers: importing the package registers the family with the Auto classes."""

import os
import sys
from importlib import import_module


# The command line: torch's threads sleep while they wait, and leave the cores to others. torch reads it when it is
# loaded; a program that Python still looks for is called "-m".
if os.path.basename(sys.argv[0]) == "linformer-hf" or (sys.argv[0] == "-m" and "linformer_hf" in sys.orig_argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import transformers

from .configuration_linformer import AUTO_MAP, LinformerConfig
from .modeling_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
    LinformerPreTrainedModel,
)


__version__ = "0.1.0"

transformers.AutoConfig.register("linformer", LinformerConfig)
LinformerConfig.register_for_auto_class()
for auto_class, target in AUTO_MAP.items():
    if auto_class != "AutoConfig":
        model_class = globals()[target.partition(".")[2]]
        getattr(transformers, auto_class).register(LinformerConfig, model_class)
        # save_pretrained then copies the modelling files beside the weights, for `trust_remote_code=True`.
        model_class.register_for_auto_class(auto_class)
del auto_class, target, model_class

VERBS = {"convert": "conversion", "embed": "embedding", "export": "hub", "push": "hub"}
VERBS |= dict.fromkeys(("pretrain", "finetune", "distill"), "training")


def __getattr__(name: str):
    """The verbs, imported when first used: `from linformer_hf import convert`."""
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{VERBS[name]}.{name}", __name__), name)


__all__ = [
    "LinformerConfig",
    "LinformerForMaskedLM",
    "LinformerForMultipleChoice",
    "LinformerForQuestionAnswering",
    "LinformerForSequenceClassification",
    "LinformerForTokenClassification",
    "LinformerModel",
    "LinformerPreTrainedModel",
]
