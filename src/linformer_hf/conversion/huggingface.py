"""Read a pretrained encoder of transformers (or, by `fairseq.py`, an official one) as a `Source`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, PreTrainedConfig

from ..hub import sentence_head
from ..utils import checksums
from ..utils.files import check_folder, is_path
from .fairseq import read_official
from .key_tables import FAMILIES, Family, dropped
from .sources import (
    POSITIONS,
    ConversionError,
    Source,
    check_tokenizer,
    explained,
    load_source_tokenizer,
    names_listed,
    rename_all,
)
from .unsupported import check_fields, check_kind


# What a source's configuration says about its head, kept as it is.
HEAD_FIELDS = ("id2label", "label2id", "problem_type", "tie_word_embeddings", "pad_token_id")


def read_source(
    name: str, revision: str | None = None, tokenizer: str | None = None, sentence: sentence_head.Choice = "none"
) -> Source:
    """Load a source.

    Args:
        name: Hub name or folder of a model of one of the `FAMILIES`, or the file (`.pt`) of an official fairseq
            Linformer.
        revision: commit, branch or tag of a Hub repository.
        tokenizer: another tokenizer than the source's own, by name or folder.
        sentence: what makes vectors of the states: the source's own modules, if it has any; nothing; or a pooling.

    Raises:
        ConversionError: unsupported or damaged; the message names what is wrong and what would work.
    """
    if Path(name).is_file():
        official = read_official(name, tokenizer)
        return replace(official, sentence=_sentence(name, sentence, official.config["hidden_size"], revision))
    if not Path(name).exists() and is_path(name):
        raise ConversionError(f"there is no file or folder {name!r}, and a Hub name has the form owner/name.")
    with explained(name):
        check_folder(name)
        checksums.check(name)
        # As it stands there: a model with code of its own is no configuration without that code, but has a kind.
        check_kind(name, PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("model_type"))
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    check_fields(name, config)
    family, title = FAMILIES[config.model_type]
    head = _head(name, config, family, title)
    with explained(name):
        reference = _load(name, config, family, title + head, revision)
    weights = rename_all(name, reference.state_dict(), family, head)
    fields = _config_fields(config, family, head)
    prefix = "" if head == "Model" else "linformer."
    if family.padding_first:
        weights[prefix + POSITIONS] = weights[prefix + POSITIONS][(config.pad_token_id or 0) + 1 :]
    fields["max_position_embeddings"] = len(weights[prefix + POSITIONS])
    head_behind = _sentence(name, sentence, fields["hidden_size"], revision)
    found = load_source_tokenizer(tokenizer or name, revision if tokenizer is None else None)
    check_tokenizer(found, fields["vocab_size"])
    return Source(name, title + head, head, fields, {}, weights, reference, found, head_behind)


def _sentence(name: str, choice: str, width: int, revision: str | None) -> sentence_head.SentenceHead | None:
    if choice == "none" or (choice == "source" and Path(name).is_file()):
        return None
    if choice != "source":
        return sentence_head.pooled(choice, width)
    with explained(name):
        try:
            found = sentence_head.read(name, revision)
        except LocalEntryNotFoundError as error:
            raise sentence_head.SentenceHeadError(
                f"whether {name} is a sentence encoder cannot be asked without a network. Convert it with one, or "
                "without its pooling: --sentence-head none."
            ) from error
        if found is not None and found.width != width:
            raise sentence_head.SentenceHeadError(
                f"{name} has a pooling of {found.width} channels behind an encoder of {width}."
            )
    return found


def _head(name: str, config: PreTrainedConfig, family: Family, title: str) -> str:
    architecture = (config.architectures or [f"{title}Model"])[0]
    head = architecture.removeprefix(title)
    head = family.read_as.get(head, head)
    if not architecture.startswith(title) or head not in family.heads:
        supported = ", ".join(title + known for known in (*family.heads, *family.read_as))
        raise ConversionError(f"{name} holds a {architecture}; supported here: {supported}.")
    for part in ("encoder", head):
        for key, (only, reason) in family.needs.get(part, {}).items():
            if (found := getattr(config, key)) != only:
                way_out = f" Convert the bare encoder: save it as a {title}Model first." if part == head else ""
                raise ConversionError(
                    f"{name} has {key}={found!r}; a {title}{head} can be converted with {only!r} only: {reason}."
                    + way_out
                )
    return head


def _load(name: str, config: PreTrainedConfig, family: Family, architecture: str, revision: str | None):
    """The source's model, complete: transformers itself would fill missing weights with random numbers."""
    model_class = getattr(transformers, architecture)
    options: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "use_safetensors": True}
    # Other shapes are ignored here so that they are named below.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, **family.read_with}
    model, info = model_class.from_pretrained(name, **options)
    pooler = {f"{module}.{part}" for module in family.pooler for part in ("weight", "bias")}
    if pooler and set(info["missing_keys"]) == pooler:  # saved without it
        model, info = model_class.from_pretrained(name, add_pooling_layer=False, **options)
    missing = info["missing_keys"]
    leftover = [key for key in info["unexpected_keys"] if not dropped(key, family) and not key.endswith("position_ids")]
    wrong = [f"{key} {list(saved)}, here {list(built)}" for key, saved, built in info["mismatched_keys"]]
    if missing or leftover or wrong:
        raise ConversionError(
            f"the source {name!r} is not whole: {names_listed('weights are missing', missing)}"
            f"{names_listed('weights have no place', leftover)}{names_listed('shapes differ', wrong)}".strip()
        )
    return model.eval()


def _config_fields(config: PreTrainedConfig, family: Family, head: str) -> dict[str, Any]:
    names = {**family.config, **family.head_config.get(head, {})}
    fields = {ours: getattr(config, theirs) for ours, theirs in names.items() if hasattr(config, theirs)}
    kept = {name: getattr(config, name) for name in HEAD_FIELDS if getattr(config, name, None) is not None}
    return {**family.fixed, **fields, **kept}
