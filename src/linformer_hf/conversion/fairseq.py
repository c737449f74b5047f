"""Read an official fairseq checkpoint: tensors and plain data, and nothing that runs."""

import io
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .key_tables import FAIRSEQ, FAIRSEQ_HEAD, dropped, invert, rename
from .sources import (
    FIRST_FEED_FORWARD,
    POSITIONS,
    WORDS,
    ConversionError,
    Source,
    check_tokenizer,
    load_source_tokenizer,
    names_listed,
)


FAIRSEQ_PAD = 1  # fairseq's dictionary: <s> 0, <pad> 1, </s> 2
# fairseq's names of activations where transformers has others.
FAIRSEQ_ACTIVATIONS = {"gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}


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


def read_official(path: str, tokenizer: str | None) -> Source:
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
    found = load_source_tokenizer(tokenizer, None) if tokenizer else None
    if found is not None:
        check_tokenizer(found, config["vocab_size"])
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
        raise ConversionError(f"{path}: {names_listed('weights have no place', leftover)}")
    weights = {ours: state[theirs] for theirs, ours in renamed.items()}
    needed = [f"linformer.{name}" for name in (WORDS, POSITIONS, FIRST_FEED_FORWARD)]
    needed += ["classifier.bias"] if titles else []
    missing = rename([name for name in needed if name not in weights], invert(table))[0]
    if missing:  # what else is missing is found when a model is built
        raise ConversionError(f"{path}: {names_listed('weights are missing', missing.values())}")
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
        raise ConversionError(f"{path}: {names_listed('weights are missing', missing)}")
    pairs = {i: (own[i, "k"], own.get((i, "v"), own[i, "k"])) for i in layers}
    both = any(not torch.equal(e, f) for e, f in pairs.values())
    weights = {
        f"linformer.encoder.layer.{i}.attention.self.projection.weight": torch.stack([e, f] if both else [e])
        for i, (e, f) in pairs.items()
    }
    return weights, fields | {"projection_sharing": "headwise" if both else "key_value"}
