"""Reading a pretrained encoder: what the Linformer computes is what the source computed.

Every source is a tiny model with large random numbers in every weight, biases and LayerNorm too, so that nothing can be
forgotten or swapped unseen. The official fairseq Linformer is written out below in plain torch.
"""

import json
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

import encoders
import linformer_hf
from encoders import (
    ARGUMENTS,
    CLOSE,
    HEADS,
    KINDS,
    LAYERS,
    PADDING,
    VOCABULARY,
    C,
    N,
    OfficialLinformer,
    assert_official,
    build,
    randomize,
    save_official,
)
from linformer_hf import LinformerConfig, LinformerModel
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.key_tables import FAMILIES
from linformer_hf.conversion.shorten import exact_twin, extend_positions, shortened
from linformer_hf.conversion.sources import ConversionError
from linformer_hf.training.finetune import finetune
from linformer_hf.utils.checksums import safer
from linformer_hf.utils.files import loading


IDENTITY = {"projection_type": "linear", "projection_init": "mean_pool", "projected_length": N}  # K = N: E = F = I
POOLED = [  # K < N
    {"projection_type": "mean_pool", "projected_length": 8},
    {"projection_type": "max_pool", "projected_length": 8},
    {"projection_type": "gated_pool", "projected_length": 8},
    {"projection_type": "gated_pool", "projected_length": 9, "local_window": 2, "boundary_slots": True},
]
SHORTEST = 8  # the smallest of these K: rows of at most so many tokens are exact
CASES = [(kind, head) for kind, (family, _) in FAMILIES.items() for head in family.heads]
CASES += [(kind, "Model without pooler") for kind, (family, _) in FAMILIES.items() if family.pooler]
CASES += [(kind, head) for kind in ("bert", "electra") for head in FAMILIES[kind][0].read_as]


@pytest.fixture(scope="module")
def saved(tokenizers, tmp_path_factory):
    """Saves a model with a tokenizer of its kind: model -> folder."""

    def save(model: nn.Module) -> Path:
        folder = tmp_path_factory.mktemp("source")
        model.save_pretrained(folder)
        tokenizers[KINDS.get(model.config.model_type, "wordpiece")].save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pretrained(request, saved):
    """A source of every family with every head: the model itself, and what was read from its folder."""
    model = build(*request.param)
    source = read_source(str(saved(model)))
    return model.base_model if source.head == "Model" else model, source  # ElectraForPreTraining loses its head


def batch(model: nn.Module, longest: int = N) -> dict[str, torch.Tensor]:
    """Three rows of `longest`, 7 and 4 real tokens, padded to N; for a multiple-choice head, three choices."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(N) < torch.tensor([longest, 7, 4])[:, None]).long()
    padding = model.config.pad_token_id
    ids = torch.randint(padding + 1, VOCABULARY, (3, N), generator=generator)
    inputs = {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}
    if model.config.model_type != "distilbert":
        types_ = getattr(model.config, "type_vocab_size", 1)
        inputs["token_type_ids"] = torch.randint(types_, (3, N), generator=generator) * mask
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: value[None] for name, value in inputs.items()}
    return inputs


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything that the model returns, by name, and of what belongs to tokens the real ones only."""
    found = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].flatten(0, -2).bool()
    named = {f"hidden state {i}": state[real] for i, state in enumerate(found.hidden_states)}
    for name, value in found.items():
        if name == "prediction_logits":  # of BertForPreTraining, which is read as BertForMaskedLM
            name = "logits"
        if isinstance(value, torch.Tensor) and name != "seq_relationship_logits":
            named[name] = value[real] if value.shape[:2] == real.shape else value
    return named


def assert_same(ours: nn.Module, theirs: nn.Module, longest: int = N) -> None:
    inputs = batch(theirs, longest)
    torch.testing.assert_close(outputs(ours, inputs), outputs(theirs, inputs), **CLOSE)


def test_exact_twin_is_the_source(pretrained):
    model, source = pretrained
    assert source.length == N
    assert source.reference is not None
    assert_same(exact_twin(source, N, "repeat"), model)


def test_identity_for_e_and_f_is_the_source(pretrained):
    model, source = pretrained
    assert_same(shortened(source, N, "repeat", IDENTITY), model)


def test_rows_of_at_most_k_tokens_are_the_source(pretrained):
    model, source = pretrained
    for projection in POOLED:
        assert_same(shortened(source, N, "repeat", projection), model, longest=SHORTEST)


def test_longer_rows_are_not(pretrained):
    """Else the comparison above would say nothing."""
    model, source = pretrained
    inputs = batch(model)
    last = f"hidden state {LAYERS}"
    for projection in POOLED:
        ours = outputs(shortened(source, N, "repeat", projection), inputs)
        assert (ours[last] - outputs(model, inputs)[last]).abs().max() > 1e-3, projection


def test_saved_and_loaded_by_the_auto_class(pretrained, tmp_path):
    model, source = pretrained
    ours = shortened(source, N, "repeat", POOLED[-1])
    ours.save_pretrained(tmp_path)
    auto_class = getattr(transformers, f"AutoModel{source.head.removeprefix('Model')}")
    arguments = {"add_pooling_layer": False} if source.head == "Model" and not source.with_pooler else {}
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True, **arguments)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(ours)
    before, after = ours.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Loaded weights lie elsewhere in memory, where the processor may add in another order: close, not equal.
    inputs = batch(model)
    torch.testing.assert_close(outputs(loaded.eval(), inputs), outputs(ours, inputs), rtol=1e-6, atol=1e-6)


def test_labels_and_padding_survive(pretrained):
    model, source = pretrained
    ours = exact_twin(source, N, "repeat").config
    for name in ("id2label", "label2id", "problem_type", "pad_token_id", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(model.config, name), name
    assert ours.layer_norm_eps == (1e-12 if source.reference.config.model_type == "distilbert" else 0.03)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("kind", FAMILIES)
def test_own_labels_and_problem_type_survive(kind, saved, tmp_path):
    labels = {0: "no", 1: "perhaps", 2: "yes"}
    fields = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    model = build(kind, "ForSequenceClassification", **fields, problem_type="multi_label_classification")
    exact_twin(read_source(str(saved(model))), N, "repeat").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.id2label, config.label2id) == (labels, fields["label2id"])
    assert config.problem_type == "multi_label_classification"
    assert config.pad_token_id == PADDING[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_untied_output_embeddings_stay_untied(kind, saved, tmp_path):
    model = build(kind, "ForMaskedLM", tie_word_embeddings=False)
    ours = exact_twin(read_source(str(saved(model))), N, "repeat")
    assert_same(ours, model)
    ours.save_pretrained(tmp_path)
    loaded = linformer_hf.LinformerForMaskedLM.from_pretrained(tmp_path)
    assert not torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)
    assert_same(loaded, model)


def test_dropout_rates_are_kept(saved):
    fields = {"hidden_dropout_prob": 0.21, "attention_probs_dropout_prob": 0.22, "classifier_dropout": 0.23}
    for kind in FAMILIES:
        names = FAMILIES[kind][0].config
        model = build(kind, "ForSequenceClassification", **{names[ours]: value for ours, value in fields.items()})
        config = exact_twin(read_source(str(saved(model))), N, "repeat").config
        assert {name: getattr(config, name) for name in fields} == fields, kind
    for kind, head, own, other in (
        ("distilbert", "ForTokenClassification", "dropout", "seq_classif_dropout"),
        ("electra", "ForMultipleChoice", "summary_last_dropout", "classifier_dropout"),
    ):
        model = build(kind, head, **{own: 0.31, other: 0.5})
        assert exact_twin(read_source(str(saved(model))), N, "repeat").config.classifier_dropout == 0.31, kind


def test_half_precision_becomes_float32(saved):
    model = build("bert", "ForMaskedLM").half()
    ours = exact_twin(read_source(str(saved(model))), N, "repeat")
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    assert_same(ours, model.float())


def test_an_ernie_without_task_types(saved):
    model = build("ernie", "ForMaskedLM", use_task_id=False)
    assert_same(exact_twin(read_source(str(saved(model))), N, "repeat"), model)


def test_names_of_old_checkpoints(saved):
    """gamma and beta, and the saved position ids, as in the first BERT and RoBERTa files on the Hub."""
    model = build("bert", "ForPreTraining")
    folder = saved(model)
    weights = load_file(folder / "model.safetensors")
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    weights["bert.embeddings.position_ids"] = torch.arange(N)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_same(exact_twin(read_source(str(folder)), N, "repeat"), model)


def test_another_tokenizer(saved, tokenizers, tmp_path):
    tokenizers["byte_level_bpe"].save_pretrained(tmp_path)
    source = read_source(str(saved(build("bert"))), tokenizer=str(tmp_path))
    assert len(source.tokenizer) == len(tokenizers["byte_level_bpe"])
    assert len(read_source(source.name).tokenizer) == len(tokenizers["wordpiece"])


# Positions


def test_longer_and_shorter_positions(saved):
    model = build("roberta", "ForMaskedLM")
    source, first = read_source(str(saved(model))), PADDING["roberta"] + 1
    theirs = model.roberta.embeddings.position_embeddings.weight
    longer = exact_twin(source, 2 * N, "repeat")
    rows = longer.get_position_embeddings().weight
    assert torch.equal(rows[:N], theirs[first:])
    assert torch.equal(rows[N:], torch.cat([theirs[first + 1 :], theirs[first + 1, None]]))
    assert_same(longer, model)
    assert longer(torch.full((1, 2 * N), 7)).logits.shape == (1, 2 * N, VOCABULARY)
    shorter = exact_twin(source, 8, "interpolate")
    assert torch.equal(shorter.get_position_embeddings().weight, theirs[first : first + 8])


@pytest.mark.parametrize(("kind", "length"), [("bert", 4096), ("big_bird", 1024), ("xlm-roberta", 8192)])
def test_long_positions_that_were_trained(kind, length, saved):
    """N is the source's own, every position at its place, and a full row beside a padded one is the source's."""
    positions = length + (PADDING[kind] + 1 if FAMILIES[kind][0].padding_first else 0)
    model = build(kind, max_position_embeddings=positions, num_hidden_layers=1)
    if kind == "big_bird":  # which reads more than 704 tokens by sparse attention, unless told
        model.set_attention_type("original_full")
    source = read_source(str(saved(model)))
    assert source.length == length
    ids = torch.randint(PADDING[kind] + 1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.tensor([length, length // 2])[:, None]).long()
    ids = torch.where(mask.bool(), ids, PADDING[kind])
    with torch.no_grad():
        ours, theirs = (one(ids, attention_mask=mask)[0] for one in (exact_twin(source, length, "repeat"), model))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)


def test_interpolated_positions_run_between_the_old_ones():
    rows = extend_positions(torch.arange(4.0)[:, None], 8, "interpolate")
    torch.testing.assert_close(rows[:, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))


@pytest.mark.parametrize(
    ("rows", "length", "expected"), [(4, 9, [0, 1, 2, 3, 1, 2, 3, 1, 2]), (4, 3, [0, 1, 2]), (1, 3, [0, 0, 0])]
)
def test_repeated_positions(rows, length, expected):
    assert extend_positions(torch.arange(float(rows))[:, None], length, "repeat")[:, 0].tolist() == expected


FLAGS = [(False, False), (True, False), (False, True), (True, True)]  # shared-kv, shared-layer
SHARING = ["headwise", "key_value", "layerwise", "layerwise"]


FORMS = ["args", "cfg with a Namespace", "cfg", "OmegaConf", "old file"]


def convert_official(path: str) -> nn.Module:
    source = read_source(path)
    assert (source.length, source.reference, source.tokenizer) == (N, None, None)
    return shortened(source, source.length, "repeat", source.projection)


@pytest.mark.parametrize("head", [None, "sentence_classification_head", "mnli"])
@pytest.mark.parametrize(("flags", "sharing"), list(zip(FLAGS, SHARING, strict=True)), ids=str)
def test_official_checkpoint(flags, sharing, head, tmp_path, monkeypatch):
    official = OfficialLinformer(*flags, head)
    ours = convert_official(save_official(official, tmp_path, "args", monkeypatch))
    assert_official(ours, official)
    config = ours.config
    assert (config.projection_sharing, config.projected_length, config.projection_type) == (sharing, 3, "linear")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.2)
    assert (config.classifier_dropout, config.pad_token_id, config.type_vocab_size) == (0.4, 1, 0)
    assert (config.layer_norm_eps, config.hidden_act, config.pooler_act) == (1e-5, "gelu", "tanh")
    ours.save_pretrained(tmp_path / "ours")
    assert_official(type(ours).from_pretrained(tmp_path / "ours"), official)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_settings(form, tmp_path, monkeypatch):
    official = OfficialLinformer(shared_layer=True)
    ours = convert_official(save_official(official, tmp_path, form, monkeypatch))
    assert_official(ours, official)
    assert (ours.config.num_attention_heads, ours.config.hidden_dropout_prob) == (HEADS, 0.2)


@pytest.mark.parametrize("head", [None, "mnli"])
def test_official_activations(head, tmp_path, monkeypatch):
    """fairseq's gelu_accurate is the tanh formula; layers and language-model head share the activation."""
    names = {"activation_fn": "gelu_accurate", "pooler_activation_fn": "relu"}
    monkeypatch.setattr(encoders, "ARGUMENTS", ARGUMENTS | names)
    official = OfficialLinformer(head=head)
    official.activation, official.pooler_activation = nn.GELU("tanh").forward, torch.relu
    ours = convert_official(save_official(official, tmp_path, "args", monkeypatch))
    assert_official(ours, official)
    assert ours.config.hidden_act == "gelu_new"


def test_official_half_precision(tmp_path, monkeypatch):
    official = OfficialLinformer().half()
    ours = convert_official(save_official(official, tmp_path, "args", monkeypatch))
    assert_official(ours, official.float())


def test_official_untied_output_embeddings(tmp_path, monkeypatch):
    official = OfficialLinformer(tied=False)
    ours = convert_official(save_official(official, tmp_path, "args", monkeypatch))
    assert ours.config.tie_word_embeddings is False
    assert_official(ours, official)
    ours.save_pretrained(tmp_path / "ours")
    assert_official(type(ours).from_pretrained(tmp_path / "ours"), official)


def test_official_names_of_older_versions(tmp_path, monkeypatch):
    official = OfficialLinformer()
    state = {
        name.replace("encoder.", "decoder.", 1).replace("sentence_decoder", "sentence_encoder"): value
        for name, value in official.state_dict().items()
    }
    state = {name.replace("layernorm_embedding", "emb_layer_norm"): value for name, value in state.items()}
    assert "decoder.sentence_encoder.emb_layer_norm.bias" in state
    assert_official(convert_official(save_official(state, tmp_path, "args", monkeypatch)), official)


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("version", [None, 1, 2])
def test_official_layers_that_share_nothing(version, differ, shared_kv, tmp_path, monkeypatch):
    """Old layer-sharing checkpoints: every layer's own matrix counts, and not the `compress_layer` beside it."""
    official = OfficialLinformer(shared_kv=shared_kv, shared_layer=True)
    if differ:  # as if the layers had been copied before training
        for i, layer in enumerate(official.encoder.sentence_encoder.layers):
            own = randomize(nn.Linear(N, 3), seed=10 + i)
            layer.self_attn.compress_k = own
            layer.self_attn.compress_v = None if shared_kv else own
    state = official.state_dict()
    layers = [f"encoder.sentence_encoder.layers.{i}." for i in range(LAYERS)]
    for layer in layers:
        if version == 2:
            continue
        del state[f"{layer}version"]
        if version:
            state[f"{layer}version"] = torch.tensor(1)
        for part in ("weight", "bias"):  # these versions kept it once more
            state[f"{layer}shared_compress_layer.{part}"] = state[f"{layer}self_attn.compress_k.{part}"]
    ours = convert_official(save_official(state, tmp_path, "args", monkeypatch))
    assert_official(ours, official)
    assert ours.config.projection_sharing == ("key_value" if differ or version == 1 else "layerwise")


def test_official_old_layers_with_two_matrices(tmp_path, monkeypatch):
    """E and F that differ although a `compress_layer` stands beside them: both are read, in every layer."""
    official, shared = OfficialLinformer(), OfficialLinformer(shared_layer=True).state_dict()
    name = "encoder.sentence_encoder.compress_layer."
    state = official.state_dict() | {key: value for key, value in shared.items() if key.startswith(name)}
    ours = convert_official(save_official(state, tmp_path, "args", monkeypatch))
    assert ours.config.projection_sharing == "headwise"
    assert_official(ours, official)


# Bad input: one clear error


def refuse(name, *parts: str, **arguments) -> str:
    with pytest.raises(ConversionError) as caught:
        read_source(str(name), **arguments)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return message


def test_unsupported_architectures(saved):
    sizes = {"vocab_size": VOCABULARY, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": N}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    refuse(saved(gpt), "'gpt2'", *FAMILIES, "fairseq")


@pytest.mark.parametrize("head", ["ForNextSentencePrediction", "LMHeadModel"])
def test_unsupported_heads(head, saved):
    refuse(saved(build("bert", head)), f"Bert{head}", "BertForMaskedLM", "BertForMultipleChoice")


def test_model_of_another_family_in_the_configuration(saved):
    model = build("bert")
    folder = saved(model)
    model.config.architectures = ["RobertaModel"]
    model.config.save_pretrained(folder)
    refuse(folder, "RobertaModel", "BertModel")


@pytest.mark.parametrize(
    ("kind", "fields", "parts"),
    [
        ("bert", {"is_decoder": True}, ["decoder", "encoder only"]),
        ("roberta", {"is_decoder": True, "add_cross_attention": True}, ["cross-attention", "encoder only"]),
        ("bert", {"position_embedding_type": "relative_key"}, ["'relative_key'", "absolute"]),
    ],
)
def test_unsupported_configurations(kind, fields, parts, saved):
    folder = saved(build(kind, "ForMaskedLM"))
    config = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    refuse(folder, str(folder), *parts)


@pytest.mark.parametrize("kind", [kind for kind, (family, _) in FAMILIES.items() if "ForMaskedLM" in family.needs])
def test_activation_that_the_language_model_head_does_not_share(kind, saved):
    title = FAMILIES[kind][1]
    refuse(saved(build(kind, "ForMaskedLM", hidden_act="relu")), "'relu'", "'gelu'", f"{title}Model")
    model = build(kind, hidden_act="relu")
    assert_same(exact_twin(read_source(str(saved(model))), N, "repeat"), model)


def test_embeddings_narrower_than_the_encoder(saved):
    """electra-small: the norm stands before the projection, where a Linformer's stands last."""
    for head in ("Model", "ForPreTraining", "ForMaskedLM"):
        folder = saved(build("electra", head, embedding_size=8))
        refuse(folder, str(folder), "embedding_size=8", f"hidden_size={C}", "google/electra-base-discriminator")


@pytest.mark.parametrize("fields", [{"summary_type": "last"}, {"summary_type": "mean"}, {"summary_use_proj": False}])
def test_summary_that_no_head_of_ours_computes(fields, saved):
    ((name, value),) = fields.items()
    refuse(saved(build("electra", "ForMultipleChoice", **fields)), f"{name}={value!r}", "first token", "ElectraModel")
    model = build("electra", "ForSequenceClassification", **fields)  # whose head has no summary
    assert_same(exact_twin(read_source(str(saved(model))), N, "repeat"), model)


def test_already_a_linformer(saved):
    config = LinformerConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    refuse(saved(LinformerModel(config)), "already", "resize_position_embeddings")


@pytest.mark.parametrize(
    ("projection", "parts"),
    [
        ({"projected_length": N + 1}, [f"max_position_embeddings={N}", f"got {N + 1}", "Lower projected_length"]),
        ({"projection_type": "mean_pool", "local_window": 2, "projected_length": 6}, ["local_window=2"]),
        ({"projection_type": "median_pool", "projected_length": 7}, ["median_pool"]),
    ],
)
def test_projections_that_cannot_be(projection, parts, saved):
    source = read_source(str(saved(build("bert"))))
    with pytest.raises(ConversionError) as caught:
        shortened(source, N, "repeat", projection)
    for part in (source.name, *parts):
        assert part in str(caught.value)


def test_tokenizer_larger_than_the_vocabulary(saved, tokenizers):
    refuse(saved(build("bert", vocab_size=150)), "200 tokens", "150", "--tokenizer")


def test_no_tokenizer(tmp_path):
    """transformers would make one up, of five special tokens."""
    build("bert").save_pretrained(tmp_path)
    refuse(tmp_path, "no tokenizer", str(tmp_path), "--tokenizer")
    refuse(tmp_path, "no tokenizer", "nowhere", "--tokenizer", tokenizer=str(tmp_path / "nowhere"))


def change(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", FAMILIES)
def test_missing_and_left_over_weights(kind, saved):
    folder = saved(build(kind, "ForSequenceClassification"))
    key = next(key for key in load_file(folder / "model.safetensors") if "layer.1" in key and key.endswith("bias"))
    change(folder, lambda weights: weights.pop(key))
    refuse(folder, "weights are missing", key)
    folder = saved(build(kind))
    change(folder, lambda weights: weights.update({"adapter.down.weight": torch.ones(2)}))
    refuse(folder, "weights have no place", "adapter.down.weight")
    change(folder, lambda weights: weights.pop("adapter.down.weight"))
    change(folder, lambda weights: weights.update({"embeddings.LayerNorm.bias": torch.ones(C + 1)}))
    refuse(folder, f"shapes differ: embeddings.LayerNorm.bias [{C + 1}], here [{C}]")


def test_half_a_pooler_is_no_encoder_without_one(saved):
    folder = saved(build("bert"))
    change(folder, lambda weights: weights.pop("pooler.dense.bias"))
    refuse(folder, "weights are missing", "pooler.dense.bias")


def test_a_head_without_the_pooler_that_it_reads(saved):
    folder = saved(build("bert", "ForSequenceClassification"))
    for part in ("weight", "bias"):
        change(folder, lambda weights, part=part: weights.pop(f"bert.pooler.dense.{part}"))
    refuse(folder, "weights are missing", "bert.pooler.dense.weight")


def test_missing_and_left_over_weights_of_an_official_checkpoint(tmp_path, monkeypatch):
    inner = "encoder.sentence_encoder."
    whole = OfficialLinformer(head="mnli").state_dict()

    def without(name):
        return save_official({key: value for key, value in whole.items() if key != name}, tmp_path, "args", monkeypatch)

    for name in ("embed_positions.weight", "embed_tokens.weight", "layers.1.self_attn.compress_k.weight"):
        refuse(without(inner + name), "weights are missing", inner + name)
    refuse(without("classification_heads.mnli.out_proj.bias"), "weights are missing", "out_proj.bias")
    path = save_official(whole | {f"{inner}layer_norm.weight": torch.ones(C)}, tmp_path, "args", monkeypatch)
    refuse(path, "weights have no place", f"{inner}layer_norm.weight")
    other = {key.replace("mnli", "sst"): value for key, value in whole.items() if "mnli" in key}
    refuse(save_official(whole | other, tmp_path, "args", monkeypatch), "several classification heads", "mnli", "sst")
    source = read_source(without(f"{inner}layers.0.fc2.bias"))
    with pytest.raises(ConversionError, match=r"missing: linformer\.encoder\.layer\.0\.output\.dense\.bias"):
        shortened(source, N, "repeat", source.projection)


def test_an_official_checkpoint_keeps_its_own_e(tmp_path, monkeypatch):
    source = read_source(save_official(OfficialLinformer(), tmp_path, "args", monkeypatch))
    with pytest.raises(ConversionError, match=r"shapes differ: .*projection\.weight \[2, 3, 12\], here \[2, 3, 24\]"):
        shortened(source, 2 * N, "repeat", source.projection)
    with pytest.raises(ConversionError, match=r"have no place: .*projection\.weight"):
        exact_twin(source, N, "repeat")


def test_official_matrices_of_different_shapes(tmp_path, monkeypatch):
    state = OfficialLinformer().state_dict()
    state["encoder.sentence_encoder.layers.1.self_attn.compress_k.weight"] = torch.ones(4, N)
    refuse(save_official(state, tmp_path, "args", monkeypatch), "one shape", "(4, 12)", "(3, 12)")


def test_a_fairseq_checkpoint_that_is_no_linformer(tmp_path, monkeypatch):
    state = {key: value for key, value in OfficialLinformer().state_dict().items() if "compress" not in key}
    refuse(save_official(state, tmp_path, "args", monkeypatch), "no Linformer")


def test_official_checkpoint_with_a_tokenizer(tmp_path, monkeypatch, tokenizers):
    path = save_official(OfficialLinformer(), tmp_path, "args", monkeypatch)
    tokenizers["byte_level_bpe"].save_pretrained(tmp_path / "tokenizer")
    assert len(read_source(path, tokenizer=str(tmp_path / "tokenizer")).tokenizer) == 400
    state = OfficialLinformer().state_dict()
    for name in ("sentence_encoder.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        state[f"encoder.{name}"] = state[f"encoder.{name}"][:390]
    path = save_official(state, tmp_path, "args", monkeypatch)
    refuse(path, "400 tokens", "390", tokenizer=str(tmp_path / "tokenizer"))


class Hostile:
    """Pickled as a call of `function`, which would make a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["os", "builtins", "dict", "old file"])
def test_hostile_pickle_is_refused_and_not_run(form, tmp_path):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()"
    call = Hostile(exec, code) if form == "builtins" else Hostile(os.system, f"touch {trace}")
    state = {"weight": call} if form == "dict" else OfficialLinformer().state_dict()
    path = tmp_path / "hostile.pt"
    content = {"args": Namespace(**ARGUMENTS), "model": state, "more": call}
    torch.save(content, path, _use_new_zipfile_serialization=form != "old file")
    name = "builtins.exec" if form == "builtins" else f"{os.system.__module__}.system"
    message = refuse(path, str(path), name.removeprefix("builtins."), "Nothing in it was executed")
    assert "weights_only" not in message  # torch's advice: to switch the protection off
    assert not trace.exists()


def test_damaged_and_foreign_files(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    for content in (bytes(range(256)) * 8, b"", b"PK\x03\x04 no zip", b"\x80\x02."):
        path.write_bytes(content)
        refuse(path, str(path), "cannot be read as a checkpoint")
    whole = Path(save_official(OfficialLinformer(), tmp_path, "args", monkeypatch)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(path, "cannot be read as a checkpoint")
    for content in ({"args": Namespace(**ARGUMENTS)}, {"model": 3}, [1, 2]):
        torch.save(content, path)
        refuse(path, "no fairseq checkpoint", "`model`", "`args`")
    state = OfficialLinformer().state_dict()
    for settings_ in ({}, {"args": None, "cfg": None}, {"cfg": {"task": {}}}, {"args": "text"}):
        torch.save({"model": state, **settings_}, path)
        refuse(path, "no settings")
    for heads in (None, "${model.heads}"):
        torch.save({"model": state, "args": {"dropout": 0.1, "encoder_attention_heads": heads}}, path)
        refuse(path, "encoder_attention_heads", repr(heads))


def test_truncated_safetensors(saved):
    folder = saved(build("bert"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(folder, str(folder), "cannot be loaded")


def test_nothing_there(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere", "no file or folder")
    refuse(tmp_path, "cannot be loaded")
    refuse("bert-base-that-nobody-has", "bert-base-that-nobody-has", "cannot be loaded")


def test_pickled_weights_of_transformers_are_not_read(saved):
    """Only safetensors: a pytorch_model.bin may run code."""
    model = build("bert")
    folder = saved(model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refuse(folder, "safetensors")


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "runs/no/such"])
def test_a_path_with_nothing_there_is_called_a_path(name):
    refuse(name, "no file or folder", name, "owner/name")


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_refused_with_a_command_that_makes_safe_ones(shards, saved):
    model = build("bert", "ForMaskedLM")
    folder = saved(model)
    (folder / "model.safetensors").unlink()
    state = list(model.state_dict().items())
    for i in range(shards):
        torch.save(dict(state[i::shards]), folder / ("pytorch_model.bin" if shards == 1 else f"pytorch_model-{i}.bin"))
    with pytest.raises(
        ConversionError, match=r"pickled files are not read: they can run code.*weights_only=True"
    ) as error:
        read_source(str(folder))
    with pytest.raises(ValueError, match="pickled files are not read"), loading(str(folder)):
        transformers.AutoModel.from_pretrained(folder, use_safetensors=True)
    subprocess.run([sys.executable, *shlex.split(str(error.value).partition("python ")[2])], check=True)
    assert_same(exact_twin(read_source(str(folder)), N, "repeat"), model)


def test_the_command_for_pickled_weights_runs_none_of_their_code(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    folder = saved(build("bert"))
    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ConversionError) as error:
        read_source(str(folder))
    command = [sys.executable, *shlex.split(str(error.value).partition("python ")[2])]
    assert subprocess.run(command, capture_output=True, check=False).returncode
    assert not (tmp_path / "evil").exists()
    assert not (folder / "model.safetensors").exists()


def test_of_a_repository_with_pickled_weights_the_converter_is_named():
    reason = "x does not appear to have a file named model.safetensors and thus cannot be loaded with `safetensors`."
    assert "spaces/safetensors/convert" in safer("acme/bert", reason)
    assert safer("acme/bert", "it is not there") == ""


def own_tokenizer(kind: str, tokenizers):
    """As the family's authors publish it; `distilbert`: with BERT's, as its first checkpoints."""
    if kind == "electra":
        return transformers.ElectraTokenizer(vocab=tokenizers["wordpiece"].get_vocab())
    if kind in ("bert", "ernie", "roberta", "data2vec-text"):
        return tokenizers[KINDS[kind]]
    if "distil" in kind:
        title = "Bert" if kind == "distilbert" else "DistilBert"
        return getattr(transformers, f"{title}Tokenizer")(vocab=tokenizers["wordpiece"].get_vocab())
    words = [("\u2581" + word, -1.0) for word in WORDS]
    vocabulary = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")] + words + [("<mask>", 0.0)]
    return getattr(transformers, f"{FAMILIES[kind][1]}Tokenizer")(vocab=vocabulary)


WORDS = ("the", "old", "river", "garden", "stone", "a", "about")
PAIRS = [("the old river", "a garden"), ("the stone", "the old stone about a river"), ("a", "a")]


@pytest.fixture(scope="module", params=[*FAMILIES, "distilbert, own tokenizer"])
def pair_classifier(request, tokenizers, tmp_path_factory):
    """A classifier of every family and its Linformer (K = N), each saved with the source's own tokenizer."""
    kind, length = request.param.partition(",")[0], 40
    tokenizer = own_tokenizer(request.param, tokenizers)
    pad = tokenizer.pad_token_id
    fields = {
        "pad_token_id": pad,
        "max_position_embeddings": length + (pad + 1 if FAMILIES[kind][0].padding_first else 0),
    }
    labels = {0: "contradiction", 1: "entailment", 2: "neutral"}
    fields |= {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    model = build(kind, "ForSequenceClassification", **fields)
    folders = [tmp_path_factory.mktemp("pairs") / name for name in ("source", "ours")]
    model.save_pretrained(folders[0])
    tokenizer.save_pretrained(folders[0])
    source = read_source(str(folders[0]))
    exact_twin(source, length, "repeat").save_pretrained(folders[1])
    source.tokenizer.save_pretrained(folders[1])
    return folders


@pytest.mark.parametrize("task", ["text-classification", "zero-shot-classification"])
def test_pairs_in_pipelines_get_the_sources_answer(task, pair_classifier):
    source, ours = (transformers.pipeline(task, model=str(folder), device="cpu") for folder in pair_classifier)
    if task == "text-classification":
        given, options = [{"text": text, "text_pair": pair} for text, pair in PAIRS], {"top_k": None}
    else:
        given = [text for text, _ in PAIRS]
        options = {"candidate_labels": ["river", "garden"], "hypothesis_template": "about a {}"}
    wanted, got = (pipe(given, **options) for pipe in (source, ours))
    batched = ours(given, batch_size=3, **options)
    # With the source's own tokenizer, whatever our folder holds.
    lent = transformers.pipeline(task, model=ours.model, tokenizer=source.tokenizer, device="cpu")(given, **options)
    for answers in (got, batched, lent):
        assert scores(answers) == pytest.approx(scores(wanted), abs=1e-4)


def scores(answers) -> list[float]:
    if isinstance(answers, dict):
        answers = answers.get("scores") or [answers["score"]]
    return [score for answer in answers for score in scores(answer)] if isinstance(answers, list) else [answers]


def test_a_pair_column_is_fine_tuned_on(pair_classifier, tmp_path):
    """At learning rate 0 the source's answer is still the answer."""
    names = ("contradiction", "entailment", "neutral")
    lines = [f"{text} {i},{pair},{names[i % 3]}\n" for i, (text, pair) in enumerate(PAIRS * 14)]
    (tmp_path / "rows.csv").write_text("text,pair,label\n" + "".join(lines), encoding="utf-8")
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "learning_rate": 0.0, "use_cpu": True}
    sections = {
        "model": {"checkpoint": str(pair_classifier[1])},
        "data": {"task": "files", "train_file": str(tmp_path / "rows.csv"), "pair_column": "pair"},
        "training": {**training, "report_to": "none", "disable_tqdm": True},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")
    tuned = finetune(tmp_path / "recipe.yaml")
    given = [{"text": text, "text_pair": pair} for text, pair in PAIRS]
    pipes = (transformers.pipeline("text-classification", model=str(folder)) for folder in (pair_classifier[0], tuned))
    wanted, got = (pipe(given, top_k=None) for pipe in pipes)
    assert scores(got) == pytest.approx(scores(wanted), abs=1e-4)
