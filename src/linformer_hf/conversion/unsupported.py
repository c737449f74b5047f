"""Encoders that cannot become a Linformer: the reason of each, and the nearest one that can.

A Linformer is BERT with fewer keys: positions are added to the embeddings and to nothing else, every layer attends to
the whole input and normalises behind its sum. What an encoder has besides would be lost without a word.
"""

from transformers import PreTrainedConfig

from .key_tables import FAMILIES
from .sources import ConversionError


_ROTARY = "its queries and keys are turned by their places (rotary), and a slot, made of many tokens, has none"
_RELATIVE = "it adds to each score a term for the distance of two tokens, and a slot, made of many tokens, has none"
_PRE_NORM = "its layers normalise what they are given, a Linformer's (as BERT's) what they give"
_NARROW = "its embeddings are narrower than its encoder and widened behind their norm, where a Linformer has no layer"
_ATTENTION = "its layers are no softmax attention of every token to every other"
_LAYOUT = "it also reads where words stand on a page"
_BERT, _ROBERTA, _XLM_R = "bert-base-uncased", "FacebookAI/roberta-base", "FacebookAI/xlm-roberta-base"
_LONG = "BAAI/bge-m3 (XLM-RoBERTa, 8,192 positions) or google/bigbird-roberta-base (4,096)"
_MINILM = "sentence-transformers/all-MiniLM-L12-v2 or all-distilroberta-v1"

# model_type, also of models with code of their own -> (why not, the nearest source that can be converted).
UNSUPPORTED = {
    "mpnet": (_RELATIVE, f"{_MINILM} for vectors, {_ROBERTA} for the rest"),
    "deberta": (_RELATIVE, f"{_ROBERTA} or google/electra-base-discriminator"),
    "deberta-v2": (_RELATIVE, f"google/electra-base-discriminator, or {_XLM_R} for mDeBERTa"),
    "xlnet": (_RELATIVE, _ROBERTA),
    "funnel": (_RELATIVE, "google/electra-base-discriminator"),
    "t5": (_RELATIVE, _ROBERTA),
    "mt5": (_RELATIVE, _XLM_R),
    "umt5": (_RELATIVE, _XLM_R),
    "nomic_bert": (_ROTARY, _LONG),
    "modernbert": (_ROTARY, _LONG),
    "eurobert": (_ROTARY, _LONG),
    "gte": (_ROTARY, _LONG),
    "new": (_ROTARY, _LONG),  # GTE with code of its own
    "jina_embeddings_v3": (_ROTARY, _LONG),
    "roformer": (_ROTARY, _BERT),
    "esm": (_ROTARY, "a protein model of the kind bert, as Rostlab/prot_bert"),
    "xlm-roberta-xl": (_PRE_NORM, "FacebookAI/xlm-roberta-large"),
    "roberta-prelayernorm": (_PRE_NORM, _ROBERTA),
    "megatron-bert": (_PRE_NORM, "bert-large-uncased"),
    "albert": (_NARROW, _BERT),
    "rembert": (_NARROW, _XLM_R),
    "mobilebert": ("its layers narrow and widen their input (bottlenecks)", "distilbert-base-uncased"),
    "squeezebert": ("its layers are grouped convolutions, a Linformer's are dense", _BERT),
    "ibert": ("it computes in integers", f"{_ROBERTA}, of which it was made"),
    "convbert": (_ATTENTION, "google/electra-base-discriminator"),
    "fnet": (_ATTENTION, _BERT),
    "nystromformer": (_ATTENTION, _ROBERTA),
    "yoso": (_ATTENTION, _ROBERTA),
    "mra": (_ATTENTION, _ROBERTA),
    "longformer": (
        "each token attends to its neighbourhood, and global tokens by maps of their own",
        f"{_ROBERTA}, of which it was made, with --max-length, or {_LONG}",
    ),
    "layoutlm": (_LAYOUT, f"{_BERT}, of which it was made"),
    "lilt": (_LAYOUT, _ROBERTA),
    "splinter": ("it answers by question tokens inside the text, a head that no Linformer has", "bert-base-cased"),
    "luke": ("it reads entities beside words", f"{_ROBERTA}, of which it was made"),
    "xmod": ("it has adapters for each language", _XLM_R),
    "canine": ("it reads characters", "google-bert/bert-base-multilingual-cased"),
}


def check_kind(name: str, kind: str | None) -> None:
    """Raises a ConversionError unless `kind`, the source's model_type, is that of a family (or None: not said)."""
    if kind is None or kind in FAMILIES:
        return
    if kind == "linformer":
        raise ConversionError(
            f"{name} is a Linformer already. Convert its source again with other options, or change its N with "
            "model.resize_position_embeddings."
        )
    if kind in UNSUPPORTED:
        reason, nearest = UNSUPPORTED[kind]
        raise ConversionError(f"{name} is a {kind!r} model, which no Linformer can follow: {reason}. Take {nearest}.")
    raise ConversionError(
        f"{name} is a {kind!r} model. Supported: {', '.join(FAMILIES)}, and the file of an official fairseq Linformer."
    )


def check_fields(name: str, config: PreTrainedConfig) -> None:
    """Raises a ConversionError for what a supported kind of model can be set to and a Linformer cannot."""
    check_kind(name, config.model_type)  # of a configuration that did not say it
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ConversionError(
            f"{name} is configured as a decoder or with cross-attention; a Linformer is an encoder only: a projection "
            "along the sequence mixes later tokens into every slot."
        )
    # As of Jina's encoders with code of their own (`alibi`, `rotary`), which call themselves bert and xlm-roberta.
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ConversionError(
            f"{name} has relative position embeddings (position_embedding_type={kind!r}): they belong to pairs of "
            f"tokens, and a slot stands for many. Only absolute positions can be converted: take {_LONG}."
        )
    if config.model_type == "electra" and config.embedding_size != config.hidden_size:
        raise ConversionError(
            f"{name} has embedding_size={config.embedding_size} and hidden_size={config.hidden_size}: it projects its "
            "embeddings behind their norm, where a Linformer has no layer, and no other weights compute the same. Both "
            "must be equal, as in google/electra-base-discriminator (768 and 768); to fill in masked tokens, take "
            "bert-base-uncased."
        )
