"""Where every weight of a source model goes: tables of module names, which are also read backwards.

A table maps a module's name in the source to its name in a Linformer; `{}` stands for a layer's number, and the last
part of a weight's name (`weight`, `bias`) stays. BERT's names are ours, so its table is an identity. What belongs to
no row of a table is an error, unless it is in `dropped`, with the reason.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_EMBEDDINGS = tuple(
    f"embeddings.{name}" for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
)
_BERT = {name: name for name in (*_EMBEDDINGS, *(f"encoder.layer.{{}}.{part}" for part in _LAYER))}
_POOLER = {"pooler.dense": "pooler.dense"}
_READ_POOLER = ("Model", "ForSequenceClassification", "ForMultipleChoice")  # our heads that have one
_MLM = "cls.predictions"
_CLASSIFIER = {"classifier": "classifier"}
_ANSWERS = {"qa_outputs": "qa_outputs"}


@dataclass(frozen=True)
class Family:
    """The models of one architecture.

    Attributes:
        prefix: name of the encoder inside the models with a head.
        config: field of LinformerConfig -> field of the source's configuration.
        encoder: names inside the encoder; `pooler` those of its pooler, if it has one.
        heads: class name without the family's name -> names of the head.
        read_as: head -> the head that it is read as; its other weights are in `dropped`.
        fixed: fields of LinformerConfig that the family's code holds, and no configuration says.
        head_config: head -> what `config` has besides, or instead, for it.
        needs: head (or `encoder`: whatever the head) -> field of the source's configuration -> the only value that a
            Linformer can follow, and why.
        read_with: fields of the source's configuration that are read as these.
        folded: embedding whose row 0 every token gets -> the one of ours that it is added to.
        padding_first: whether positions are counted from the padding token's id + 1 on; the rows before are no places.
        dropped: weights that are left behind on purpose (regular expressions), with the reason.
    """

    prefix: str
    config: Mapping[str, str]
    encoder: Mapping[str, str]
    heads: Mapping[str, Mapping[str, str]]
    pooler: Mapping[str, str] = field(default_factory=dict)
    read_as: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    head_config: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    needs: Mapping[str, Mapping[str, tuple[Any, str]]] = field(default_factory=dict)
    read_with: Mapping[str, Any] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    padding_first: bool = False
    dropped: Mapping[str, str] = field(default_factory=dict)

    def table(self, head: str, with_pooler: bool) -> dict[str, str]:
        """Source module -> our module, for the model `head` (`Model` is the bare encoder)."""
        ours, theirs = ("", "") if head == "Model" else ("linformer.", f"{self.prefix}.")
        # A head that brings its own dense layer in front of the classifier leaves the encoder's pooler unread.
        own_pooler = f"{ours}pooler.dense" in self.heads[head].values()
        pooler = self.pooler if with_pooler and head in _READ_POOLER and not own_pooler else {}
        encoder = {**self.encoder, **pooler}
        return {**{theirs + key: ours + value for key, value in encoder.items()}, **self.heads[head]}

    def added(self, head: str) -> dict[str, str]:
        """`folded` as weights of the model `head`."""
        ours, theirs = ("", "") if head == "Model" else ("linformer.", f"{self.prefix}.")
        return {f"{theirs}{key}.weight": f"{ours}{value}.weight" for key, value in self.folded.items()}


_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "type_vocab_size",
    "classifier_dropout",
)
_BERT_CONFIG = {name: name for name in _SAME}
_GELU_HEAD = {"hidden_act": ("gelu", "the language-model head always uses 'gelu', and a Linformer's uses hidden_act")}

BERT = Family(
    prefix="bert",
    config=_BERT_CONFIG,
    encoder=_BERT,
    pooler=_POOLER,
    heads={
        "Model": {},
        "ForMaskedLM": {
            f"{_MLM}.{part}": f"{_MLM}.{part}" for part in ("transform.dense", "transform.LayerNorm", "decoder")
        },
        "ForSequenceClassification": _CLASSIFIER,
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": _ANSWERS,
        "ForMultipleChoice": _CLASSIFIER,
    },
    read_as={"ForPreTraining": "ForMaskedLM"},
    dropped={
        r"cls\.predictions\.bias": "a second name of the decoder's bias, or used by nothing",
        r"cls\.seq_relationship\..*": "next-sentence prediction; no Linformer has that head",
        r"(\w+\.)?pooler\..*": "the pooler is not read by this head",
    },
)
ERNIE = replace(  # with use_task_id, each token has a task type besides, 0 unless the caller says another
    BERT,
    prefix="ernie",
    folded={"embeddings.task_type_embeddings": "embeddings.position_embeddings"},
)
BIG_BIRD = replace(
    BERT,
    pooler={"pooler": "pooler.dense"},
    heads={
        **{head: BERT.heads[head] for head in ("Model", "ForMaskedLM", "ForTokenClassification", "ForMultipleChoice")},
        # A dense layer and hidden_act on the first token, and a classifier; answers have a layer of their own.
        "ForSequenceClassification": {
            "classifier.dense": "linformer.pooler.dense",
            "classifier.out_proj": "classifier",
        },
    },
    head_config={"ForSequenceClassification": {"pooler_act": "hidden_act"}},
    needs={
        "encoder": {
            "use_bias": (True, "a Linformer's queries, keys and values have biases"),
            "rescale_embeddings": (False, "a Linformer adds word embeddings as they are"),
        }
    },
    # Its sparse attention stands in for full attention, which transformers itself takes for up to 704 tokens.
    read_with={"attention_type": "original_full"},
)
ROBERTA = Family(
    prefix="roberta",
    config=_BERT_CONFIG,
    encoder=_BERT,
    pooler=_POOLER,
    heads={
        "Model": {},
        "ForMaskedLM": {
            "lm_head.dense": f"{_MLM}.transform.dense",
            "lm_head.layer_norm": f"{_MLM}.transform.LayerNorm",
            "lm_head.decoder": f"{_MLM}.decoder",
        },
        # RoBERTa's head is a dense layer and tanh on the first token, which is our pooler, and a classifier.
        "ForSequenceClassification": {
            "classifier.dense": "linformer.pooler.dense",
            "classifier.out_proj": "classifier",
        },
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": _ANSWERS,
        "ForMultipleChoice": _CLASSIFIER,
    },
    needs={"ForMaskedLM": _GELU_HEAD},
    dropped={
        r"lm_head\.bias": "a second name of the decoder's bias, or used by nothing",
        r"(\w+\.)?pooler\..*": "the pooler is not read by this head",
    },
    padding_first=True,
)
DATA2VEC = replace(ROBERTA, prefix="data2vec_text")
DISTILBERT = Family(
    prefix="distilbert",
    config={
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "initializer_range",
        "classifier_dropout": "seq_classif_dropout",
    },
    encoder={
        **{name: name for name in _EMBEDDINGS if "token_type" not in name},
        **{
            f"transformer.layer.{{}}.{theirs}": f"encoder.layer.{{}}.{ours}"
            for theirs, ours in zip(
                (
                    "attention.q_lin",
                    "attention.k_lin",
                    "attention.v_lin",
                    "attention.out_lin",
                    "sa_layer_norm",
                    "ffn.lin1",
                    "ffn.lin2",
                    "output_layer_norm",
                ),
                _LAYER,
                strict=True,
            )
        },
    },
    heads={
        "Model": {},
        "ForMaskedLM": {
            "vocab_transform": f"{_MLM}.transform.dense",
            "vocab_layer_norm": f"{_MLM}.transform.LayerNorm",
            "vocab_projector": f"{_MLM}.decoder",
        },
        "ForSequenceClassification": {"pre_classifier": "linformer.pooler.dense", **_CLASSIFIER},
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": _ANSWERS,
        "ForMultipleChoice": {"pre_classifier": "linformer.pooler.dense", **_CLASSIFIER},
    },
    fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12, "pooler_act": "relu"},
    head_config={"ForTokenClassification": {"classifier_dropout": "dropout"}},
)
_SUMMARY = "a Linformer's head reads a dense layer over the first token"
ELECTRA = Family(  # without a pooler; unsupported.py refuses those whose embeddings are narrower than the encoder
    prefix="electra",
    config=_BERT_CONFIG,
    encoder=_BERT,
    heads={
        "Model": {},
        "ForMaskedLM": {
            "generator_predictions.dense": f"{_MLM}.transform.dense",
            "generator_predictions.LayerNorm": f"{_MLM}.transform.LayerNorm",
            "generator_lm_head": f"{_MLM}.decoder",
        },
        # A dense layer and gelu on the first token, which is our pooler with another activation, and a classifier.
        "ForSequenceClassification": {
            "classifier.dense": "linformer.pooler.dense",
            "classifier.out_proj": "classifier",
        },
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": _ANSWERS,
        "ForMultipleChoice": {"sequence_summary.summary": "linformer.pooler.dense", **_CLASSIFIER},
    },
    read_as={"ForPreTraining": "Model"},
    fixed={"pooler_act": "gelu"},
    head_config={
        "ForMultipleChoice": {"pooler_act": "summary_activation", "classifier_dropout": "summary_last_dropout"}
    },
    needs={
        "ForMaskedLM": _GELU_HEAD,
        "ForMultipleChoice": {"summary_type": ("first", _SUMMARY), "summary_use_proj": (True, _SUMMARY)},
    },
    dropped={r"discriminator_predictions\..*": "which tokens were replaced; no Linformer has that head"},
)
# transformers' model_type -> (family, how its classes are called).
FAMILIES = {
    "bert": (BERT, "Bert"),
    "roberta": (ROBERTA, "Roberta"),
    "xlm-roberta": (ROBERTA, "XLMRoberta"),
    "camembert": (ROBERTA, "Camembert"),
    "data2vec-text": (DATA2VEC, "Data2VecText"),
    "distilbert": (DISTILBERT, "DistilBert"),
    "electra": (ELECTRA, "Electra"),
    "ernie": (ERNIE, "Ernie"),
    "big_bird": (BIG_BIRD, "BigBird"),
}
FAIRSEQ_HEAD = "classification_heads.sentence_classification_head"  # the name that fairseq gives it unless told another
# The official Linformer. `compress_k` and `compress_v` are E and F: fairseq.py stacks them.
FAIRSEQ = Family(
    prefix="encoder.sentence_encoder",
    config={},
    encoder={
        "embed_tokens": "embeddings.word_embeddings",
        "embed_positions": "embeddings.position_embeddings",
        "layernorm_embedding": "embeddings.LayerNorm",
        **{
            f"layers.{{}}.{theirs}": f"encoder.layer.{{}}.{ours}"
            for theirs, ours in zip(
                (
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.out_proj",
                    "self_attn_layer_norm",
                    "fc1",
                    "fc2",
                    "final_layer_norm",
                ),
                _LAYER,
                strict=True,
            )
        },
    },
    heads={
        "ForMaskedLM": {
            "encoder.lm_head.weight": f"{_MLM}.decoder.weight",
            "encoder.lm_head.bias": f"{_MLM}.decoder.bias",
            "encoder.lm_head.dense": f"{_MLM}.transform.dense",
            "encoder.lm_head.layer_norm": f"{_MLM}.transform.LayerNorm",
        },
        "ForSequenceClassification": {
            f"{FAIRSEQ_HEAD}.dense": "linformer.pooler.dense",
            f"{FAIRSEQ_HEAD}.out_proj": "classifier",
        },
    },
    dropped={
        r"(.*\.)?version": "bookkeeping of fairseq",
        r".*\.(shared_)?compress_layer\.bias": "owned by fairseq's shared module, used by nothing",
        r".*\.compress_[kv]\.bias": "owned by fairseq's shared module, used by nothing",
        r".*\._float_tensor": "bookkeeping of fairseq",
    },
)


def invert(table: Mapping[str, str]) -> dict[str, str]:
    """Our module -> source module. Raises a ValueError if two rows have the same target."""
    inverse = {value: key for key, value in table.items()}
    if len(inverse) != len(table):
        raise ValueError("the table sends two names to one, so it cannot be read backwards.")
    return inverse


def rename(names: Iterable[str], table: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Apply a table.

    Returns:
        name -> new name, and the names that no row is for. A row may name a module or one weight of it.
    """
    renamed, leftover = {}, []
    rows = {_slot(key): value for key, value in table.items()}
    for name in names:
        place, (module, _, weight) = _slot(name), name.rpartition(".")
        if place in rows:
            renamed[name] = _fill(rows[place], name)
        elif _slot(module) in rows:
            renamed[name] = f"{_fill(rows[_slot(module)], name)}.{weight}"
        else:
            leftover.append(name)
    return renamed, leftover


def dropped(name: str, family: Family) -> bool:
    """Whether the weight is left behind on purpose."""
    return any(re.fullmatch(pattern, name) for pattern in family.dropped)


def _slot(name: str) -> str:
    """The name with its layer's number (or its `{}`) taken out."""
    return re.sub(r"\.(\d+|\{\})(?=\.|$)", ".#", name)


def _fill(target: str, name: str) -> str:
    number = re.search(r"\.(\d+)(?=\.|$)", name)
    return target.replace("{}", number[1]) if number else target
