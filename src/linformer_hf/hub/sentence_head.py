"""What makes vectors of an encoder's states: the modules and prompts of a sentence-transformers folder.

They are read as data, without that library, and written in the schema that servers read too: `pooling_mode_*` flags
beside the newer `pooling_mode`, and module paths that every version of sentence-transformers knows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..utils.files import write_text


MODULES_FILE, SETTINGS_FILE, ENCODER_FILE = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
# Older folders call the last one after the encoder's family.
ENCODER_FILES = (ENCODER_FILE, *(f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "xlm-roberta")))
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
KINDS = ("Pooling", "Dense", "Normalize")
SENTENCE = "sentence_embedding"
SETTINGS: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
Choice = Literal["source", "none", "mean", "cls", "max"]


def _weighted_mean(states: Tensor) -> Tensor:
    weights = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
    return torch.einsum("bnc,n->bc", states, weights) / weights.sum()


# Mode -> its flag, and what it makes of states [B, N, C] without padding. Several are joined in this order.
POOLINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "cls": ("pooling_mode_cls_token", lambda states: states[:, 0]),
    "max": ("pooling_mode_max_tokens", lambda states: states.amax(1)),
    "mean": ("pooling_mode_mean_tokens", lambda states: states.mean(1)),
    "mean_sqrt_len_tokens": (
        "pooling_mode_mean_sqrt_len_tokens",
        lambda states: states.sum(1) / states.shape[1] ** 0.5,
    ),
    "weightedmean": ("pooling_mode_weightedmean_tokens", _weighted_mean),
    "lasttoken": ("pooling_mode_lasttoken", lambda states: states[:, -1]),
}


class SentenceHeadError(ValueError):
    """A module that cannot be carried along, or a damaged file; the message says which."""


class Module(NamedTuple):
    """One of `KINDS`, with what its config.json says in today's words and its weights."""

    kind: str
    config: dict[str, Any]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class SentenceHead:
    """What stands behind a sentence encoder.

    Attributes:
        modules: a pooling first.
        settings: prompts, the default prompt's name and the similarity, for config_sentence_transformers.json.
        encoder: what sentence_bert_config.json says of the texts, but for their length.
        length: tokens of the longest text, special ones included, as that file says; None where it does not.
    """

    modules: tuple[Module, ...]
    settings: dict[str, Any]
    encoder: dict[str, Any]
    length: int | None = None

    @property
    def width(self) -> int:
        """C, the size of the states."""
        return self.modules[0].config["word_embedding_dimension"]

    @property
    def reads_one_token(self) -> bool:
        """Whether a part of a text has no vector, since one token stands for all of it."""
        return not {"cls", "lasttoken"}.isdisjoint(_modes(self.modules[0].config))

    @property
    def facts(self) -> dict[str, Any]:
        """What a model card says of it."""
        prompts = {name: text for name, text in (self.settings.get("prompts") or {}).items() if text}
        return {"vectors": str(self), "prompts": prompts}

    def __str__(self) -> str:
        words = {
            "Pooling": "{pooling_mode}",
            "Dense": "dense {in_features} to {out_features}",
            "Normalize": "normalised",
        }
        return ", ".join(
            words[one.kind].format(**one.config | {"pooling_mode": " and ".join(_modes(one.config))})
            for one in self.modules
        )

    def __call__(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors [B, D] of states [B, N, C]; mask [B, N] is 1 on real tokens (default: all are)."""
        if mask is not None:
            return torch.cat([self(row[real][None]) for row, real in zip(states, mask.bool(), strict=True)])
        vectors = states
        for module in self.modules:
            vectors = _apply(module, vectors)
        return vectors

    def write(self, folder: Path, length: int | None) -> None:
        """The files of sentence-transformers beside an encoder that reads at most `length` tokens (None: any)."""
        kinds = ["Transformer", *(module.kind for module in self.modules)]
        paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
        listed = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ]
        for path, module in zip(paths[1:], self.modules, strict=True):
            (folder / path).mkdir(exist_ok=True)
            if module.config:
                _write(folder / path / CONFIG_FILE, module.config)
            if module.weights:
                save_file(module.weights, folder / path / WEIGHTS_FILE, {"format": "pt"})
        _write(folder / SETTINGS_FILE, self.settings)
        _write(folder / ENCODER_FILE, {"max_seq_length": length, **self.encoder})
        _write(folder / MODULES_FILE, listed)


def pooled(mode: str, width: int) -> SentenceHead:
    """A head of one pooling and nothing else, for states of size `width`."""
    pooling = _pooling({"word_embedding_dimension": width, "pooling_mode": mode})
    return SentenceHead((pooling,), SETTINGS, {"do_lower_case": False})


def read(name: str | Path, revision: str | None = None) -> SentenceHead | None:
    """The head of a folder or a Hub repository, of which only these small files are fetched; None if there is none.

    Raises:
        SentenceHeadError: a module cannot be carried along, or a file is damaged; the message names it.
        LocalEntryNotFoundError: the Hub cannot be asked.
    """
    listed = _json(name, MODULES_FILE, revision, list)
    if listed is None or len(listed) == 1:  # as of a cross-encoder
        return None
    try:
        places = [(str(one["type"]), PurePosixPath(one["path"])) for one in listed]
    except (TypeError, KeyError) as error:
        raise SentenceHeadError(f"{name}/{MODULES_FILE} is damaged ({error!r}).") from error
    kinds = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind, _ in places]
    if strange := [kind for kind in kinds[1:] if kind not in KINDS]:
        raise SentenceHeadError(
            f"{name} has {', '.join(strange)} behind its encoder. Only {', '.join(KINDS)} can be carried along."
        )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") > 1 or places[0][1] != PurePosixPath():
        raise SentenceHeadError(
            f"{name} must hold an encoder at its top and one pooling behind it; {MODULES_FILE} lists "
            f"{', '.join(f'{kind} in {str(path)!r}' for kind, (_, path) in zip(kinds, places, strict=True))}."
        )
    modules, width = [], 0
    for kind, (_, path) in zip(kinds[1:], places[1:], strict=True):
        if path.is_absolute() or ".." in path.parts:
            raise SentenceHeadError(f"{name}/{MODULES_FILE} names {str(path)!r}, which is outside of the folder.")
        module, width = _module(name, kind, path, revision, width)
        modules.append(module)
    encoder = _encoder_file(name, revision)
    return SentenceHead(tuple(modules), _settings(name, revision), _encoder(name, encoder), _length(encoder))


def longest_text(name: str | Path, revision: str | None = None) -> int | None:
    """Tokens of the longest text that a folder or a repository is for, special ones included; None where none says."""
    return _length(_encoder_file(name, revision))


def files(folder: Path) -> list[str]:
    """Names of the files in a folder that `read` has read."""
    listed = _json(folder, MODULES_FILE, None, list) or []
    inside = [f"{one['path']}/{file}" for one in listed[1:] for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return [file for file in (MODULES_FILE, SETTINGS_FILE, *ENCODER_FILES, *inside) if (folder / file).is_file()]


def _apply(module: Module, vectors: Tensor) -> Tensor:
    if module.kind == "Pooling":
        return torch.cat([POOLINGS[mode][1](vectors) for mode in _modes(module.config)], dim=-1)
    if module.kind == "Normalize":
        return nn.functional.normalize(vectors, dim=-1)
    weight, bias = (module.weights.get(f"linear.{name}") for name in ("weight", "bias"))
    assert weight is not None
    vectors = nn.functional.linear(vectors, weight.to(vectors), None if bias is None else bias.to(vectors))
    return _activation(module.config)(vectors)


def _activation(config: dict[str, Any]) -> nn.Module:
    found = getattr(nn, config["activation_function"].rpartition(".")[2], None)
    if not config["activation_function"].startswith("torch.nn.") or not isinstance(found, type):
        raise AttributeError(config["activation_function"])
    return found()


def _modes(config: dict[str, Any]) -> tuple[str, ...]:
    mode = config.get("pooling_mode", ())
    return (mode,) if isinstance(mode, str) else tuple(mode)


def _module(name: str | Path, kind: str, path: PurePosixPath, revision: str | None, width: int) -> tuple[Module, int]:
    """One module and the size of what it gives, from that of what it is given."""
    config = _json(name, f"{path}/{CONFIG_FILE}", revision) or {}
    place = f"{name}/{path}"
    if config.get("use_residual"):
        raise SentenceHeadError(f"{place} has use_residual, which cannot be carried along.")
    if config.get("module_input_name", SENTENCE) != SENTENCE:
        raise SentenceHeadError(f"{place} does not work on a text's vector, so it cannot be carried along.")
    try:
        if kind == "Pooling":
            module = _pooling(config)
            return module, len(_modes(module.config)) * module.config["word_embedding_dimension"]
        if kind == "Dense":
            return _dense(name, path, config, revision, width), config["out_features"]
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SentenceHeadError(f"{place} cannot be carried along: {type(error).__name__} {error}.") from error
    return Module(kind, {}, {}), width


def _pooling(config: dict[str, Any]) -> Module:
    width = config.get("word_embedding_dimension", config.get("embedding_dimension"))
    modes = _modes(config) or tuple(mode for mode, (flag, _) in POOLINGS.items() if config.get(flag)) or ("mean",)
    if not isinstance(width, int) or set(modes) - POOLINGS.keys():
        raise SentenceHeadError(
            f"a pooling by {' and '.join(map(str, modes))} over {width} channels cannot be carried along; "
            f"{', '.join(POOLINGS)} can."
        )
    flags = {flag: mode in modes for mode, (flag, _) in POOLINGS.items()}
    # The flags cannot say in which order several are joined.
    mode: Any = modes[0] if len(modes) == 1 else list(modes)
    kept = {"include_prompt": config.get("include_prompt", True), "pooling_mode": mode}
    return Module("Pooling", {"word_embedding_dimension": width, **flags, **kept}, {})


def _dense(name: str | Path, path: PurePosixPath, config: dict[str, Any], revision: str | None, width: int) -> Module:
    found = _file(name, f"{path}/{WEIGHTS_FILE}", revision)
    if found is None:
        raise SentenceHeadError(
            f"{name}/{path} has no {WEIGHTS_FILE}: pickled weights are not read, they can run code. If you trust who "
            "made them, SentenceTransformer(...).save(FOLDER) of sentence-transformers writes safe ones."
        )
    kept = {key: config[key] for key in ("in_features", "out_features")}
    kept["bias"] = config.get("bias", True)
    kept["activation_function"] = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    _activation(kept)
    weights = load_file(found)
    shapes = {"linear.weight": [kept["out_features"], kept["in_features"]]}
    shapes |= {"linear.bias": [kept["out_features"]]} if kept["bias"] else {}
    if kept["in_features"] != width or {key: list(tensor.shape) for key, tensor in weights.items()} != shapes:
        raise SentenceHeadError(
            f"{name}/{path} is {kept['in_features']} to {kept['out_features']} with "
            f"{', '.join(f'{key} {list(tensor.shape)}' for key, tensor in weights.items())}, which does not fit to the "
            f"{width} channels that it is given."
        )
    return Module("Dense", kept, weights)


def _settings(name: str | Path, revision: str | None) -> dict[str, Any]:
    found = _json(name, SETTINGS_FILE, revision) or {}
    return {key: found.get(key) or default for key, default in SETTINGS.items()}


def _encoder_file(name: str | Path, revision: str | None) -> dict[str, Any]:
    return next((read for file in ENCODER_FILES if (read := _json(name, file, revision))), {})


def _length(encoder: dict[str, Any]) -> int | None:
    length = encoder.get("max_seq_length")
    return length if isinstance(length, int) else None


def _encoder(name: str | Path, found: dict[str, Any]) -> dict[str, Any]:
    if found.get("module_output_name", "token_embeddings") != "token_embeddings":
        raise SentenceHeadError(f"{name} makes its vectors in the encoder ({found['module_output_name']}).")
    more = {"processing_kwargs": found["processing_kwargs"]} if found.get("processing_kwargs") else {}
    return {"do_lower_case": bool(found.get("do_lower_case")), **more}


def _json(name: str | Path, file: str, revision: str | None, kind: type = dict) -> Any:
    found = _file(name, file, revision)
    try:
        content = None if found is None else json.loads(found.read_text(encoding="utf-8"))
        if found is not None and not isinstance(content, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        return content
    except ValueError as error:
        raise SentenceHeadError(f"{name}/{file} is damaged ({error}).") from error


def _file(name: str | Path, file: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    try:
        return Path(hf_hub_download(str(name), file, revision=revision))
    except LocalEntryNotFoundError:  # no network; a repository may be known to be without that file
        if try_to_load_from_cache(str(name), file, revision=revision) is not _CACHED_NO_EXIST:
            raise
    except EntryNotFoundError:
        pass
    return None


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
