"""The tables of names, held against the names that the models themselves have."""

from pathlib import Path

import pytest
import torch
import transformers

import linformer_hf
from linformer_hf.conversion.key_tables import FAIRSEQ, FAMILIES, dropped, invert, rename


SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
CASES = [(kind, head) for kind, (family, _) in FAMILIES.items() for head in family.heads]


def names(build) -> set[str]:
    with torch.device("meta"):
        return set(build().state_dict())


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_round_trip_of_all_real_names(kind, head):
    """Twelve layers, so that layer 1 is told from layer 11."""
    family, title = FAMILIES[kind]
    widths = {"embedding_size": SIZES["hidden_size"]} if kind == "electra" else {}
    config = transformers.AutoConfig.for_model(kind, **SIZES, **widths)
    theirs = names(lambda: getattr(transformers, title + head)(config))
    renamed, leftover = rename(theirs, table := family.table(head, with_pooler=bool(family.pooler)))
    left = []
    if head == "ForMaskedLM" and kind not in ("distilbert", "electra"):
        left = ["lm_head.bias" if family.padding_first else "cls.predictions.bias"]
    if kind == "big_bird" and head not in ("Model", "ForMultipleChoice"):  # it builds its pooler for every head
        left += ["bert.pooler.weight", "bert.pooler.bias"]
    assert sorted(leftover) == sorted(left)
    assert all(dropped(name, family) for name in leftover)
    assert len(set(renamed.values())) == len(theirs) - len(leftover)
    back, leftover = rename(renamed.values(), invert(table))
    assert leftover == []
    assert back == {ours: name for name, ours in renamed.items()}

    types = 0 if kind == "distilbert" else 2
    config = linformer_hf.LinformerConfig(**SIZES, projection_type="mean_pool", type_vocab_size=types)
    ours = names(lambda: getattr(linformer_hf, f"Linformer{head}")(config))
    prefix = "" if head == "Model" else "linformer."
    lacking = {f"{prefix}pooler.dense.{part}" for part in ("weight", "bias")} if not family.pooler else set()
    assert set(renamed.values()) <= ours
    assert ours - set(renamed.values()) <= lacking


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_page_on_converting_names_every_family(kind):
    assert f"`{kind}`" in (Path(__file__).parents[2] / "docs" / "guides" / "convert.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("head", FAIRSEQ.heads)
def test_round_trip_of_the_official_names(head):
    config = linformer_hf.LinformerConfig(**SIZES, projection_type="mean_pool", type_vocab_size=0)
    ours = names(lambda: getattr(linformer_hf, f"Linformer{head}")(config))
    theirs, leftover = rename(ours, invert(table := FAIRSEQ.table(head, with_pooler=False)))
    assert leftover == []
    assert "encoder.sentence_encoder.layers.11.self_attn.k_proj.bias" in theirs.values()
    assert rename(theirs.values(), table) == ({name: our for our, name in theirs.items()}, [])


def test_a_name_without_a_row_is_left_over():
    table = {"layers.{}.fc1": "layer.{}.dense", "head": "cls"}
    renamed, leftover = rename(["layers.10.fc1.weight", "head.bias", "head.more.bias", "fc1.weight"], table)
    assert renamed == {"layers.10.fc1.weight": "layer.10.dense.weight", "head.bias": "cls.bias"}
    assert leftover == ["head.more.bias", "fc1.weight"]


def test_two_rows_with_one_target_cannot_be_read_backwards():
    with pytest.raises(ValueError, match="cannot be read backwards"):
        invert({"a": "c", "b": "c"})


def test_what_is_left_behind_is_matched_whole():
    family, _ = FAMILIES["bert"]
    assert dropped("bert.pooler.dense.bias", family)
    assert dropped("cls.seq_relationship.weight", family)
    assert not dropped("bert.encoder.pooler.dense.bias", family)
    assert not dropped("cls.predictions.decoder.bias", family)
