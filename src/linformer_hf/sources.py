"""Read a pretrained encoder, BERT's kin or an official fairseq Linformer, as a Linformer's configuration and weights.

`read_source` loads and renames; nothing is approximated here. `exact_twin` gives the source's own function as a
Linformer with K = N, whose every query sees every token; `shortened` gives the Linformer with K < N.
"""

import contextlib
import io
import logging
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import checksums, modeling_linformer
from .configuration_linformer import LinformerConfig
from .key_tables import DISTILBERT, FAIRSEQ, FAIRSEQ_HEAD, FAMILIES, ROBERTA, Family, dropped, invert, rename
from .modeling_linformer import LinformerPreTrainedModel


logger = logging.getLogger(__name__)

POSITIONS = "embeddings.position_embeddings.weight"
WORDS = "embeddings.word_embeddings.weight"
FIRST_FEED_FORWARD = "encoder.layer.0.intermediate.dense.bias"
# What a source's configuration says about its head, kept as it is.
HEAD_FIELDS = ("id2label", "label2id", "problem_type", "tie_word_embeddings", "pad_token_id")
FAIRSEQ_PAD = 1  # fairseq's dictionary: <s> 0, <pad> 1, </s> 2
# fairseq's names of activations where transformers has others.
FAIRSEQ_ACTIVATIONS = {"gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}


class ConversionError(ValueError):
    """A source that cannot be converted; the message says why and what could be."""


@dataclass
class Source:
    """A pretrained encoder in a Linformer's terms.

    Attributes:
        name: what the user called it.
        architecture: the source's class.
        head: our class without `Linformer`: `Model`, `ForMaskedLM`, ...
        config: fields of LinformerConfig, without those of the projection.
        projection: for a fairseq Linformer, its projection's fields; else empty, and K is free.
        weights: our names -> tensors; E and F are among them for a fairseq Linformer.
        reference: the source's own model in evaluation mode; None for fairseq.
        tokenizer: None where a fairseq checkpoint came without one.
    """

    name: str
    architecture: str
    head: str
    config: dict[str, Any]
    projection: dict[str, Any]
    weights: dict[str, torch.Tensor]
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def length(self) -> int:
        """N, the longest input."""
        return self.config["max_position_embeddings"]

    @property
    def with_pooler(self) -> bool:
        return any(name.startswith(("pooler.", "linformer.pooler.")) for name in self.weights)


def read_source(name: str, revision: str | None = None, tokenizer: str | None = None) -> Source:
    """Load a source.

    Args:
        name: Hub name or folder of a `bert`, `roberta`, `xlm-roberta`, `camembert` or `distilbert` model, or the file
            (`.pt`) of an official fairseq Linformer.
        revision: commit, branch or tag of a Hub repository.
        tokenizer: another tokenizer than the source's own, by name or folder.

    Raises:
        ConversionError: unsupported or damaged; the message names what is wrong and what would work.
    """
    if Path(name).is_file():
        return _read_fairseq(name, tokenizer)
    if not Path(name).exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ConversionError(f"there is no file or folder {name!r}, and a Hub name has the form owner/name.")
    with _explained(name):
        checksums.check(name)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    _check_supported(name, config)
    family, title = FAMILIES[config.model_type]
    head = _head(name, config, family, title)
    with _explained(name):
        reference = _load(name, config, family, title + head, revision)
    weights = _rename(name, reference.state_dict(), family, head)
    fields = _config_fields(config, family)
    prefix = "" if head == "Model" else "linformer."
    if family is ROBERTA:  # position embeddings are counted from padding_idx + 1 on
        weights[prefix + POSITIONS] = weights[prefix + POSITIONS][(config.pad_token_id or 0) + 1 :]
    if family is DISTILBERT:
        fields |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12, "pooler_act": "relu"}
        if head == "ForTokenClassification":
            fields["classifier_dropout"] = config.dropout
    fields["max_position_embeddings"] = len(weights[prefix + POSITIONS])
    found = _tokenizer(tokenizer or name, revision if tokenizer is None else None)
    _check_tokenizer(found, fields["vocab_size"])
    return Source(name, title + head, head, fields, {}, weights, reference, found)


def exact_twin(source: Source, length: int, positions: Literal["repeat", "interpolate"]) -> LinformerPreTrainedModel:
    """The source as a Linformer whose every query sees every token, for inputs of up to `length` tokens."""
    return shortened(source, length, positions, {"projection_type": "mean_pool", "projected_length": length})


def shortened(
    source: Source, length: int, positions: Literal["repeat", "interpolate"], projection: dict[str, Any]
) -> LinformerPreTrainedModel:
    """The source with shortened attention, in evaluation mode and float32.

    Args:
        length: N; above the source's own, positions are extended, below it they are cut.
        positions: how they are extended: the rows over again, or stretched by linear interpolation.
        projection: fields of LinformerConfig such as `projected_length`.

    Raises:
        ConversionError: the configuration is refused, or a weight is missing or left over.
    """
    fields = {**source.config, "max_position_embeddings": length, **projection}
    try:
        config = LinformerConfig(**fields, dtype="float32")
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{source.name} cannot be converted like this: {reason}") from error
    model_class = getattr(modeling_linformer, f"Linformer{source.head}")
    arguments = {"add_pooling_layer": source.with_pooler} if source.head == "Model" else {}
    model: LinformerPreTrainedModel = model_class(config, **arguments)
    weights = dict(source.weights)
    prefix = "" if source.head == "Model" else "linformer."
    weights[prefix + POSITIONS] = extend_positions(weights[prefix + POSITIONS], length, positions)
    own = model.state_dict()
    started = {name for name in own if ".projection." in name or ".correction." in name}
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    missing = set(own) - set(weights) - started - tied
    leftover = set(weights) - set(own)
    wrong = [
        f"{name} {list(weights[name].shape)}, here {list(own[name].shape)}"
        for name in set(own) & set(weights)
        if own[name].shape != weights[name].shape
    ]
    if missing or leftover or wrong:
        raise ConversionError(
            f"{source.name}: {_list('weights are missing', missing)}{_list('weights have no place', leftover)}"
            f"{_list('shapes differ', wrong)}".strip()
        )
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def extend_positions(rows: torch.Tensor, length: int, how: Literal["repeat", "interpolate"]) -> torch.Tensor:
    """[n, C] -> [length, C]. `repeat` starts again at row 1 behind the last one: row 0 is the first token's alone."""
    n = len(rows)
    if length <= n:
        return rows[:length].clone()
    if how == "interpolate":
        return torch.nn.functional.interpolate(rows.T[None], size=length, mode="linear")[0].T.contiguous()
    index = torch.arange(length)
    return rows[torch.where(index < n, index, 1 + (index - n) % (n - 1))] if n > 1 else rows.expand(length, -1).clone()


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What transformers raises, as one line that names the source."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # damaged files set off anything, bare Exceptions included
        reason = " ".join(str(error).split())
        way_out = checksums.safer(name, reason)
        raise ConversionError(f"the source {name!r} cannot be loaded: {reason[:400]}{way_out}") from error


def _check_supported(name: str, config: PreTrainedConfig) -> None:
    kind = config.model_type
    if kind == "linformer":
        raise ConversionError(
            f"{name} is a Linformer already. Convert its source again with other options, or change its N with "
            "model.resize_position_embeddings."
        )
    if kind not in FAMILIES:
        raise ConversionError(
            f"{name} is a {kind!r} model. Supported: {', '.join(FAMILIES)}, and the file of an official fairseq "
            "Linformer."
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ConversionError(
            f"{name} is configured as a decoder or with cross-attention; a Linformer is an encoder only: a projection "
            "along the sequence mixes later tokens into every slot."
        )
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ConversionError(
            f"{name} has relative position embeddings (position_embedding_type={kind!r}): they belong to pairs of "
            "tokens, and a slot stands for many. Only absolute positions can be converted."
        )


def _head(name: str, config: PreTrainedConfig, family: Family, title: str) -> str:
    architecture = (config.architectures or [f"{title}Model"])[0]
    head = "ForMaskedLM" if architecture == "BertForPreTraining" else architecture.removeprefix(title)
    if not architecture.startswith(title) or head not in family.heads:
        supported = ", ".join(title + known for known in family.heads)
        raise ConversionError(f"{name} holds a {architecture}; supported here: {supported}.")
    if family is ROBERTA and head == "ForMaskedLM" and config.hidden_act != "gelu":
        raise ConversionError(
            f"{name} has hidden_act={config.hidden_act!r}, but its language-model head always uses 'gelu', and a "
            "Linformer's uses hidden_act. Convert the bare encoder: save it as a RobertaModel first."
        )
    return head


def _load(name: str, config: PreTrainedConfig, family: Family, architecture: str, revision: str | None):
    """The source's model, complete: transformers itself would fill missing weights with random numbers."""
    model_class = getattr(transformers, architecture)
    options: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "use_safetensors": True}
    # Other shapes are ignored here so that they are named below.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = model_class.from_pretrained(name, **options)
    if set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}:  # saved without its pooler
        model, info = model_class.from_pretrained(name, add_pooling_layer=False, **options)
    missing = info["missing_keys"]
    leftover = [key for key in info["unexpected_keys"] if not dropped(key, family) and not key.endswith("position_ids")]
    wrong = [f"{key} {list(saved)}, here {list(built)}" for key, saved, built in info["mismatched_keys"]]
    if missing or leftover or wrong:
        raise ConversionError(
            f"the source {name!r} is not whole: {_list('weights are missing', missing)}"
            f"{_list('weights have no place', leftover)}{_list('shapes differ', wrong)}".strip()
        )
    return model.eval()


def _rename(name: str, state: dict[str, torch.Tensor], family: Family, head: str) -> dict[str, torch.Tensor]:
    with_pooler = any("pooler." in key for key in state) and bool(family.pooler)
    renamed, leftover = rename(state, family.table(head, with_pooler))
    leftover = [key for key in leftover if not dropped(key, family) and not key.endswith("position_ids")]
    if leftover:
        raise ConversionError(f"{name}: {_list('weights have no place', leftover)}")
    return {ours: state[theirs].detach() for theirs, ours in renamed.items()}


def _list(title: str, names: Any) -> str:
    names = sorted(names)
    return (
        f"{title}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}. " if names else ""
    )


def _config_fields(config: PreTrainedConfig, family: Family) -> dict[str, Any]:
    fields = {ours: getattr(config, theirs) for ours, theirs in family.config.items() if hasattr(config, theirs)}
    return fields | {name: getattr(config, name) for name in HEAD_FIELDS if getattr(config, name, None) is not None}


def _tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        found = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        # Where there is no vocabulary at all, transformers makes up a tokenizer of special tokens.
        if set(found.get_vocab().values()) <= set(found.all_special_ids):
            raise ValueError("it holds no vocabulary")
    except Exception as error:  # as in `_explained`
        raise ConversionError(
            f"no tokenizer can be loaded from {name!r} ({' '.join(str(error).split())[:200]}). Name one with "
            "--tokenizer."
        ) from error
    return found


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, the model {vocab_size}: they do "
            "not belong together. Name the model's own with --tokenizer."
        )


class _Bag:
    """Stands in for OmegaConf's classes, whose code is never imported: keeps the state and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _empty(*_: Any) -> dict:
    """Stands in for `collections.defaultdict`, OmegaConf's cache of resolved values, which says nothing here."""
    return {}


# What a fairseq checkpoint's settings may name besides plain data: OmegaConf's containers and nodes, and the types that
# their metadata mentions. torch.load(weights_only=True) refuses every other name.
_STAND_INS: list[tuple[Callable, str]] = [
    (_empty, "collections.defaultdict"),
    *(
        (_Bag, name)
        for name in (
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
            "typing.Any",
            *(f"builtins.{kind.__name__}" for kind in (bool, dict, float, int, list, str)),
        )
    ),
]


def _plain(value: Any) -> Any:
    """Settings as dicts, lists and plain values, whatever they were kept in."""
    if isinstance(value, Namespace):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, _Bag):
        inside = vars(value)
        return _plain(inside["_content"] if "_content" in inside else inside.get("_val"))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _unpickle_tensors(path: str) -> Any:
    """The content of a `.pt` file: tensors and plain data only. No code of the file's is run."""
    try:
        with torch.serialization.safe_globals([Namespace, *_STAND_INS]):
            return torch.load(io.BytesIO(Path(path).read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's own: whatever a damaged or hostile file sets off
        # torch's own text advises weights_only=False, which would run the file's code: only the cause is passed on.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        reason = f"it names {named[1]}, which is neither a tensor nor a plain setting" if named else reason.rstrip(".")
        raise ConversionError(
            f"{path} cannot be read as a checkpoint of tensors and plain settings: {reason[:200]}. Nothing in it was "
            "executed. Where the file is trusted, save its entries `model` and `args` (as a dict) to a new one."
        ) from error


def _read_fairseq(path: str, tokenizer: str | None) -> Source:
    checkpoint = _unpickle_tensors(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ConversionError(f"{path} is no fairseq checkpoint: it needs the entries `model` and `args` or `cfg`.")
    settings = _plain(checkpoint.get("args"))
    if not settings:
        whole = _plain(checkpoint.get("cfg"))
        settings = whole.get("model") if isinstance(whole, dict) else None
    if not isinstance(settings, dict) or not settings:
        raise ConversionError(f"{path} holds no settings (`args` or `cfg`), so heads and dropout are unknown.")
    state = {key: value for key, value in checkpoint["model"].items() if isinstance(value, torch.Tensor)}
    weights, projection, head = _fairseq_weights(path, state)
    config = _fairseq_config(path, settings, weights, head)
    found = _tokenizer(tokenizer, None) if tokenizer else None
    if found is not None:
        _check_tokenizer(found, config["vocab_size"])
    return Source(path, "fairseq Linformer", head, config, projection, weights, None, found)


def _fairseq_config(path: str, settings: dict[str, Any], weights: dict[str, torch.Tensor], head: str) -> dict[str, Any]:
    words = weights[f"linformer.{WORDS}"]
    heads = settings.get("encoder_attention_heads")
    if not isinstance(heads, int):
        raise ConversionError(
            f"{path}: the settings say encoder_attention_heads={heads!r}. It must be an int, and no weight's shape "
            "tells it."
        )
    dropout = settings.get("dropout", 0.1)
    activation = str(settings.get("activation_fn", "gelu"))
    config: dict[str, Any] = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": 1 + max(int(key.split(".")[3]) for key in weights if ".encoder.layer." in key),
        "num_attention_heads": heads,
        "intermediate_size": len(weights[f"linformer.{FIRST_FEED_FORWARD}"]),
        "hidden_act": FAIRSEQ_ACTIVATIONS.get(activation, activation),
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,  # fairseq's Linformer takes --dropout here too
        "classifier_dropout": settings.get("pooler_dropout", 0.0),
        "pooler_act": str(settings.get("pooler_activation_fn", "tanh")),
        "layer_norm_eps": 1e-5,
        "type_vocab_size": 0,
        "pad_token_id": FAIRSEQ_PAD,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": len(weights[f"linformer.{POSITIONS}"]),
    }
    if head == "ForSequenceClassification":
        config["num_labels"] = len(weights["classifier.bias"])
    else:  # fairseq decides by the values too, and has a flag for it: --untie-weights-roberta
        config["tie_word_embeddings"] = torch.equal(weights.get("cls.predictions.decoder.weight", words), words)
    return config


def _fairseq_weights(path: str, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Our names -> tensors, the projection's configuration, and the head."""
    # The names of older versions, which fairseq renames while loading.
    state = {
        re.sub(r"^decoder\.", "encoder.", key).replace(".emb_layer_norm.", ".layernorm_embedding."): value
        for key, value in state.items()
    }
    projections, projection = _fairseq_projections(path, state)
    titles = {key.split(".")[1] for key in state if key.startswith("classification_heads.")}
    if len(titles) > 1:
        raise ConversionError(f"{path} holds several classification heads ({', '.join(sorted(titles))}); keep one.")
    head = "ForSequenceClassification" if titles else "ForMaskedLM"
    if titles:  # whatever its name is, the table has fairseq's default one
        state = {
            re.sub(r"^classification_heads\.[^.]+", FAIRSEQ_HEAD, key): value
            for key, value in state.items()
            if not key.startswith("encoder.lm_head.")
        }
    table = FAIRSEQ.table(head, with_pooler=False)
    renamed, leftover = rename(state, table)
    leftover = [key for key in leftover if not dropped(key, FAIRSEQ)]
    if leftover:
        raise ConversionError(f"{path}: {_list('weights have no place', leftover)}")
    weights = {ours: state[theirs] for theirs, ours in renamed.items()}
    needed = [f"linformer.{name}" for name in (WORDS, POSITIONS, FIRST_FEED_FORWARD)]
    needed += ["classifier.bias"] if titles else []
    missing = rename([name for name in needed if name not in weights], invert(table))[0]
    if missing:  # what else is missing is found when a model is built
        raise ConversionError(f"{path}: {_list('weights are missing', missing.values())}")
    # Row 0 and 1 are no positions: fairseq counts them from the padding token's id + 1 on.
    weights[f"linformer.{POSITIONS}"] = weights[f"linformer.{POSITIONS}"][FAIRSEQ_PAD + 1 :]
    return weights | projections, projection, head


def _fairseq_projections(path: str, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Take E [k, n] and F [k, n] out of `state`: as our [S, K, N], and the fields of the configuration.

    With `--shared-layer-kv-compressed` one tensor stands at the encoder and again in every layer. Layers whose
    `version` is below 2 were saved by code that shared nothing, and fairseq reads each layer's own; so does this.
    """
    old = any(int(state[key]) < 2 for key in state if re.fullmatch(r".*\.layers\.\d+\.version", key))
    shared = [state.pop(key) for key in list(state) if key.endswith("compress_layer.weight")]
    layers = sorted({int(found[1]) for key in state if (found := re.match(r".*\.layers\.(\d+)\.", key))})
    place = "encoder.sentence_encoder.layers.{}.self_attn.compress_{}.weight"
    names = {(i, part): place.format(i, part) for i in layers for part in "kv"}
    own = {key: state.pop(name) for key, name in names.items() if name in state}
    matrices = [*shared, *own.values()]
    if not matrices:
        raise ConversionError(f"{path} holds no compress_k.weight: it is no Linformer's checkpoint.")
    shapes = {tuple(matrix.shape) for matrix in matrices}
    if len(shapes) > 1:
        raise ConversionError(f"{path}: E and F must have one shape [k, n] in all layers, found {sorted(shapes)}.")
    fields = {"projection_type": "linear", "projected_length": len(matrices[0])}
    if shared and not old and all(torch.equal(matrix, shared[0]) for matrix in matrices):
        return {"linformer.encoder.projection.weight": shared[0][None]}, fields | {"projection_sharing": "layerwise"}
    missing = [names[i, "k"] for i in layers if (i, "k") not in own]
    if missing:
        raise ConversionError(f"{path}: {_list('weights are missing', missing)}")
    pairs = {i: (own[i, "k"], own.get((i, "v"), own[i, "k"])) for i in layers}
    both = any(not torch.equal(e, f) for e, f in pairs.values())
    weights = {
        f"linformer.encoder.layer.{i}.attention.self.projection.weight": torch.stack([e, f] if both else [e])
        for i, (e, f) in pairs.items()
    }
    return weights, fields | {"projection_sharing": "headwise" if both else "key_value"}
