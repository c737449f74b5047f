"""Linformer for Hugging Face Transformers: importing the package registers the family with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_linformer import LinformerConfig
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

AutoConfig.register("linformer", LinformerConfig)
LinformerConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, LinformerModel),
    (AutoModelForMaskedLM, LinformerForMaskedLM),
    (AutoModelForSequenceClassification, LinformerForSequenceClassification),
    (AutoModelForTokenClassification, LinformerForTokenClassification),
    (AutoModelForQuestionAnswering, LinformerForQuestionAnswering),
    (AutoModelForMultipleChoice, LinformerForMultipleChoice),
):
    auto_class.register(LinformerConfig, model_class)
    # save_pretrained then copies the three modelling files beside the weights, for `trust_remote_code=True`.
    model_class.register_for_auto_class(auto_class.__name__)
del auto_class, model_class

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
