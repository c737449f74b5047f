"""What an official checkpoint's settings say, and what they leave to fairseq's defaults."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from encoders import HEADS, C, N, OfficialLinformer
from linformer_hf.conversion.fairseq import read_official
from linformer_hf.conversion.sources import POSITIONS, ConversionError


INNER = "encoder.sentence_encoder."


def written(path, state: dict, **settings) -> str:
    torch.save({"model": state, "args": Namespace(encoder_attention_heads=HEADS, **settings)}, path / "a.pt")
    return str(path / "a.pt")


@pytest.mark.parametrize("head", [None, "mnli"])
def test_settings_that_are_not_there_are_fairseqs_defaults(tmp_path, head):
    source = read_official(written(tmp_path, OfficialLinformer(head=head).state_dict()), None)
    config = source.config
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == (0.1, 0.1)
    assert (config["classifier_dropout"], config["hidden_act"], config["pooler_act"]) == (0.0, "gelu", "tanh")
    assert (config["bos_token_id"], config["pad_token_id"], config["eos_token_id"]) == (0, 1, 2)
    assert source.head == ("ForSequenceClassification" if head else "ForMaskedLM")
    assert config.get("num_labels") == (3 if head else None)


def test_the_first_position_is_the_row_behind_the_padding_tokens(tmp_path):
    state = OfficialLinformer().state_dict()
    source = read_official(written(tmp_path, state), None)
    assert source.length == N
    assert torch.equal(source.weights[f"linformer.{POSITIONS}"], state[f"{INNER}embed_positions.weight"][2:])


def test_e_and_f_are_stacked_in_this_order_and_once_where_they_are_equal(tmp_path):
    name = "linformer.encoder.layer.1.attention.self.projection.weight"
    state = OfficialLinformer().state_dict()
    e, f = (state[f"{INNER}layers.1.self_attn.compress_{part}.weight"] for part in "kv")
    source = read_official(written(tmp_path, state), None)
    assert torch.equal(source.weights[name], torch.stack([e, f]))
    assert source.projection == {"projection_type": "linear", "projected_length": 3, "projection_sharing": "headwise"}
    for layer in range(2):  # F is written out, and E's own number everywhere
        state[f"{INNER}layers.{layer}.self_attn.compress_v.weight"] = state[
            f"{INNER}layers.{layer}.self_attn.compress_k.weight"
        ]
    source = read_official(written(tmp_path, state), None)
    assert torch.equal(source.weights[name], e[None])
    assert source.projection["projection_sharing"] == "key_value"


def test_one_matrix_for_all_layers_is_kept_once(tmp_path):
    source = read_official(written(tmp_path, OfficialLinformer(shared_layer=True).state_dict()), None)
    held = [name for name in source.weights if "projection" in name]
    assert held == ["linformer.encoder.projection.weight"]
    assert source.weights[held[0]].shape == (1, 3, N)


def test_output_embeddings_are_tied_where_their_numbers_are_the_words(tmp_path):
    tied, own = OfficialLinformer(tied=True).state_dict(), OfficialLinformer(tied=False).state_dict()
    del tied["encoder.lm_head.weight"]  # old checkpoints hold the words once
    for state, expected in ((tied, True), (own, False)):
        assert read_official(written(tmp_path, state), None).config["tie_word_embeddings"] is expected


def test_a_message_names_the_setting_its_value_and_what_it_must_be(tmp_path):
    state = OfficialLinformer().state_dict()
    torch.save({"model": state, "args": Namespace(encoder_attention_heads="12")}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"encoder_attention_heads='12'\. It must be an int"):
        read_official(str(tmp_path / "a.pt"), None)


def test_a_file_that_names_a_class_is_refused_with_the_way_out(tmp_path):
    torch.save({"model": nn.Linear(C, C)}, tmp_path / "a.pt")
    with pytest.raises(ConversionError) as caught:
        read_official(str(tmp_path / "a.pt"), None)
    for part in ("names torch.nn.modules.linear.Linear", "Nothing in it was executed", "save its entries `model` and"):
        assert part in str(caught.value)
