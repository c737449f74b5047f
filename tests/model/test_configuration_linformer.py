"""LinformerConfig: the paper's defaults, a JSON round trip, and one clear error for whatever cannot work."""

import json
import runpy
import sys
import tracemalloc
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import BANDS, LEARNED, SHAPES, TYPES, tiny_config
from transformers import AutoConfig

from linformer_hf import LinformerConfig, LinformerModel, configuration_linformer


POOLED = ("mean_pool", "max_pool", "gated_pool")


def test_defaults_are_the_best_row_of_the_papers_table_2():
    config = LinformerConfig()
    assert config.model_type == "linformer"
    assert (config.max_position_embeddings, config.projected_length) == (512, 256)
    assert (config.projection_type, config.projection_sharing) == ("linear", "layerwise")
    assert config.projection_init == "normal"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.vocab_size, config.type_vocab_size) == (3072, 30522, 2)
    for option in ("freeze_projection", "log_count_bias", "boundary_slots", "sparse_prediction", "length_correction"):
        assert getattr(config, option) is False
    assert (config.local_window, config.pooler_act) == (0, "tanh")


@pytest.mark.parametrize("variants", [TYPES, SHAPES], ids=["TYPES", "SHAPES"])
def test_every_projection_type_is_held_against_the_reference(variants):
    kinds = typing.get_args(LinformerConfig.__annotations__["projection_type"])
    assert {variant["projection_type"] for variant in variants} == set(kinds)


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_types_are_shared_layerwise_unless_told(kind):
    config = tiny_config(projection_type=kind)
    assert (config.projection_sharing, config.projection_init) == ("layerwise", "normal")


@pytest.mark.parametrize("kind", POOLED)
def test_pooled_types_have_nothing_to_share_or_start(kind):
    config = tiny_config(projection_type=kind)
    assert config.projection_sharing is None
    assert config.projection_init is None


def test_one_projected_length_for_each_layer():
    assert tiny_config(projected_length=7).projected_lengths == [7, 7]
    assert tiny_config(projected_length=[7, 3], projection_sharing="key_value").projected_lengths == [7, 3]
    assert tiny_config(projected_length=[7, 7]).projected_lengths == [7, 7]  # equal: layerwise sharing works
    assert tiny_config(num_hidden_layers=0).projected_lengths == []
    assert tiny_config(num_hidden_layers=0, projected_length=[]).projected_lengths == []


# What cannot work: (arguments beside those of the tiny configuration, message)
REFUSED = [
    *(
        ({"pad_token_id": value}, rf"pad_token_id must lie between 0 and vocab_size - 1 = 49.*None.*got {value}")
        for value in (-1, 50)
    ),
    *(
        ({name: 0}, rf"{name} must be at least 1, got 0")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
    ),
    *(({name: "gelo"}, rf"^{name} must be one of .*gelu.*, got 'gelo'") for name in ("hidden_act", "pooler_act")),
    ({"initializer_range": -0.1}, r"initializer_range must be at least 0, got -0.1"),
    ({"layer_norm_eps": 0.0}, r"layer_norm_eps must be above 0, got 0.0"),
    *(({name: -1}, rf"{name} must be at least 0, got -1") for name in ("num_hidden_layers", "type_vocab_size")),
    ({"hidden_size": 15}, r"hidden_size \(15\) must be a multiple of num_attention_heads \(2\)"),
    *(
        ({name: value}, rf"{name} must be at least 0 and below 1, got {value}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        for value in (-0.1, 1.0)
    ),
    *(
        (
            {"projected_length": k, **more},
            rf"1 and max_position_embeddings=20, got {value}: .*Lower projected_len",
        )
        for k, value, more in (
            (21, 21, {}),
            (0, 0, {}),
            (-3, -3, {}),
            ([5, 21], 21, {"projection_sharing": "key_value"}),
            (21, 21, {"num_hidden_layers": 0}),
        )
    ),
    *(
        ({"projected_length": 21, "projection_type": kind}, "max_position_embeddings=20, got 21")
        for kind in ("fixed", "conv", "dense_conv", *POOLED)
    ),
    (
        {"projected_length": [5]},
        r"lists 1 values for num_hidden_layers=2 layers; give one int per layer",
    ),
    ({"projected_length": [5, 5, 5]}, r"lists 3 values for num_hidden_layers=2"),
    ({"projected_length": []}, r"lists 0 values for num_hidden_layers=2"),
    (
        {"projected_length": [5, 4]},
        r"projection_sharing='layerwise' uses one E.*projected_length=\[5, 4\] differs.*projection_sharing='key_value'",
    ),
    (
        {"projection_type": "conv", "projected_length": 6},
        r"max_position_embeddings=20 is not a multiple of projected_length=6\. "
        r"Choose 1, 2, 4, 5, 10, 20 \(a divisor of 20\).*type='mean_pool'",
    ),
    (
        {"projection_type": "conv", "projected_length": [5, 8], "projection_sharing": "none"},
        r"not a multiple of projected_length=8",
    ),
    *(
        (
            {**options, "projected_length": k},
            rf"at least {least} with local_window={options.get('local_window', 0)} .*"
            rf"boundary_slots={options.get('boundary_slots', False)} .*got {k}\. Raise projected_length, or lower",
        )
        for options, k, least in (
            ({"projection_type": "mean_pool", "boundary_slots": True}, 1, 3),
            ({"projection_type": "mean_pool", "boundary_slots": True}, 2, 3),
            ({"projection_type": "gated_pool", "boundary_slots": True}, 2, 3),
            ({"projection_type": "gated_pool", "local_window": 1}, 3, 4),
            ({"projection_type": "gated_pool", "local_window": 3}, 9, 10),
            ({"projection_type": "linear", "local_window": 2}, 5, 7),
            ({"projection_type": "conv", "local_window": 3}, 8, 10),
            ({"projection_type": "gated_pool", "local_window": 2, "boundary_slots": True}, 8, 9),
        )
    ),
    (
        {"projection_type": "gated_pool", "local_window": 3, "projected_length": [10, 9]},
        r"at least 10 with local_window=3 .*got 9\.",
    ),
    (
        {"local_window": -1},
        r"local_window must be at least 0 .*, got -1\.",
    ),
    (
        {"projection_type": "gated_pool", "projected_length": 8, "original_max_position_embeddings": 7},
        r"original_max_position_embeddings must be at least projected_length=8, .*got 7\.",
    ),
    *(
        (
            {"projection_type": kind, "original_max_position_embeddings": 99},
            rf"original_max_position_embeddings=99 would have no effect: projection_type='{kind}' .*log_count_bias",
        )
        for kind in (*LEARNED, "mean_pool", "max_pool")
    ),
    *(
        (
            {"projection_type": kind, "projected_length": 9, "local_window": 2},
            rf"projection_type='{kind}' needs .*=20 is not a multiple of projected_length=9 - 6 for local_window\. "
            r"Choose 7, 8, 10, 11, 16 \(a divisor of 20, and 6 for the band\)",
        )
        for kind in ("conv", "dense_conv")
    ),
    *(
        (
            {"projection_type": kind, "projection_sharing": sharing, "projection_init": "offsets"},
            rf"projection_init='offsets' .*type='{kind}' and projection_sharing='{sharing}' all heads have one",
        )
        for kind in ("linear", "fixed")
        for sharing in ("headwise", "key_value", "layerwise")
    ),
    *(
        (
            {"projection_type": kind, name: value},
            rf"{name}='{value}' would have no effect: projection_type='{kind}' has no matrices.*Leave {name} unset",
        )
        for kind in POOLED
        for name, value in (("projection_sharing", "none"), ("projection_init", "normal"))
        if (kind, name) != ("gated_pool", "projection_init")
    ),
    *(
        (
            {"projection_type": "gated_pool", "projection_init": start},
            rf"projection_init='{start}' is no start of the gates .*: choose 'normal' .* or 'mean_pool'",
        )
        for start in ("xavier", "offsets")
    ),
    *(
        (
            {"projection_type": kind, name: True},
            rf"{name}=True would have no effect: projection_type='{kind}' .*{able}.*Leave {name} False, or choose",
        )
        for name, able, kinds in (
            ("boundary_slots", "mean_pool, max_pool, gated_pool", LEARNED),
            ("log_count_bias", "'mean_pool' nor 'max_pool'", (*LEARNED, "gated_pool")),
            (
                "freeze_projection",
                "'linear', 'conv', 'dense_conv' and 'gated_pool'",
                ("fixed", "mean_pool", "max_pool"),
            ),
        )
        for kind in kinds
    ),
    *(
        ({name: True}, rf"{name}=True is not possible: .*mixes later tokens.*use it as an encoder")
        for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder")
    ),
]


def id_of(arguments: dict) -> str:
    return "-".join(f"{name}={value}" for name, value in arguments.items())


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[id_of(arguments) for arguments, _ in REFUSED])
def test_what_cannot_work_is_refused_with_value_limit_and_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**arguments)


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[id_of(arguments) for arguments, _ in REFUSED])
def test_the_model_refuses_what_was_assigned_afterwards(arguments, message):
    """Assignment checks types only; combinations are checked again where a model is built."""
    # What follows from the type is undone first, as a new configuration would.
    pooled = arguments.get("projection_type") in POOLED
    config = tiny_config(projection_type=arguments["projection_type"]) if pooled else tiny_config()
    for name, value in arguments.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        LinformerModel(config)


def test_a_refused_config_json_is_not_loaded(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "projected_length": 21}))
    with pytest.raises(ValueError, match="max_position_embeddings=20, got 21"):
        LinformerConfig.from_pretrained(tmp_path)


def test_several_faults_are_still_one_error():
    with pytest.raises(ValueError, match=r"^vocab_size must be at least 1, got 0\.$"):
        tiny_config(vocab_size=0, projected_length=21, projection_type="conv")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        (
            "projection_type",
            "nystrom",
            "'linear', 'fixed', 'mean_pool', 'max_pool', 'conv', 'dense_conv', 'gated_pool'",
        ),
        ("projection_sharing", "kv", "'none', 'headwise', 'key_value', 'layerwise'"),
        ("projection_init", "orthogonal", "'normal', 'xavier', 'mean_pool', 'offsets'"),
        ("classifier_pooling", "max", "'cls', 'mean'"),
    ],
)
def test_an_unknown_word_is_refused_with_the_known_ones(name, value, allowed):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"(?s){name}.*{allowed}.*{value}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "16"),
        ("hidden_size", 16.0),
        ("max_position_embeddings", None),
        ("projected_length", 0.5),
        ("projected_length", "5"),
        ("projected_length", [5, 2.5]),
        ("projected_length", True),
        ("freeze_projection", 1),
        ("log_count_bias", "yes"),
        ("boundary_slots", None),
        ("local_window", 1.5),
        ("local_window", True),
        ("length_correction", 1),
        ("pooler_act", None),
        ("sparse_prediction", 0),
        ("hidden_dropout_prob", "0.1"),
        ("projection_type", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{name}'"):
        tiny_config(**{name: value})
    config = tiny_config()
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{name}'"):
        setattr(config, name, value)


# JSON

ROUND_TRIPS = [
    *TYPES,
    {"projected_length": [5, 4], "projection_sharing": "none", "projection_init": "xavier", "freeze_projection": True},
    {"projection_type": "max_pool", "log_count_bias": True, "boundary_slots": True, "classifier_pooling": "mean"},
    {"projection_type": "gated_pool", **BANDS[1], "freeze_projection": True},
    {"length_correction": True, "pooler_act": "relu"},
    {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "problem_type": "single_label_classification"},
    {"sparse_prediction": True, "classifier_dropout": 0.3, "eos_token_id": [1, 2], "pad_token_id": None},
]


@pytest.mark.parametrize("arguments", ROUND_TRIPS, ids=id_of)
def test_json_round_trip(arguments, tmp_path):
    config = tiny_config(**arguments)
    config.save_pretrained(tmp_path)
    for loaded in (LinformerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LinformerConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        for name, value in arguments.items():
            assert getattr(loaded, name) == value, name
    assert LinformerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_overrides_are_applied_and_checked_when_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert LinformerConfig.from_pretrained(tmp_path, projected_length=4).projected_length == 4
    with pytest.raises(ValueError, match="max_position_embeddings=20, got 21"):
        LinformerModel(LinformerConfig.from_pretrained(tmp_path, projected_length=21))


def test_a_configuration_names_no_code_of_its_own():
    """A model that is saved with its code writes where it is (test_remote_code.py)."""
    assert not hasattr(tiny_config(), "auto_map")
    named = tiny_config(auto_map={"AutoModel": "elsewhere.Model"})  # as read from a folder
    assert named.auto_map == {"AutoModel": "elsewhere.Model"}
    assert "auto_map" not in named.to_dict()
    assert named.to_diff_dict()["auto_map"] == named.auto_map


# Whatever is accepted runs


@st.composite
def fields(draw):
    """Arguments without regard to what fits together; the configuration decides."""
    layers = draw(st.integers(0, 2))
    k = st.integers(1, 12)
    values = {
        "num_hidden_layers": layers,
        "max_position_embeddings": draw(st.sampled_from([6, 8, 12])),
        "projected_length": draw(k | st.lists(k, min_size=layers, max_size=layers)),
        "projection_type": draw(st.sampled_from([*LEARNED, *POOLED])),
        "length_correction": draw(st.booleans()),
        "pooler_act": draw(st.sampled_from(["tanh", "relu"])),
        "classifier_pooling": draw(st.sampled_from(["cls", "mean"])),
        "type_vocab_size": draw(st.integers(0, 2)),
        "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "pad_token_id": draw(st.sampled_from([None, 0, 3])),
    }
    pooled, gated = values["projection_type"] in POOLED, values["projection_type"] == "gated_pool"
    if pooled or draw(st.booleans()):
        values["log_count_bias"] = not gated and draw(st.booleans())
        values["boundary_slots"] = draw(st.booleans())
    values["local_window"] = draw(st.integers(0, 3))
    if gated:
        values["freeze_projection"] = draw(st.booleans())
        values["projection_init"] = draw(st.sampled_from([None, "normal", "mean_pool"]))
    if not pooled:
        values["projection_sharing"] = draw(st.sampled_from([None, "none", "headwise", "key_value", "layerwise"]))
        values["projection_init"] = draw(st.sampled_from([None, "normal", "xavier", "mean_pool", "offsets"]))
        values["freeze_projection"] = draw(st.booleans())
    return values


@settings(deadline=None, max_examples=100)
@given(values=fields(), length=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_what_the_configuration_accepts_builds_runs_and_learns(values, length, seed):
    try:
        config = tiny_config(**values)
    except ValueError:
        assume(False)
    torch.manual_seed(seed)
    model = LinformerModel(config)
    length = min(length, config.max_position_embeddings)
    mask = torch.randint(0, 2, (3, length))
    output = model(torch.randint(0, 50, (3, length)), mask)
    assert output.last_hidden_state.shape == (3, length, 16)
    assert output.last_hidden_state.isfinite().all()
    (output.last_hidden_state.sum() + output.pooler_output.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_configuration_costs_the_same_for_any_number_of_layers():
    """A file from elsewhere must not take the machine's memory before a model is even built."""
    tracemalloc.start()
    try:
        LinformerConfig(num_hidden_layers=10**5, projected_length=128)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_a_transformers_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.6"))
    with pytest.raises(ImportError, match=r"needs transformers 5.0 or later, and this is transformers 4.57.6: pip"):
        runpy.run_path(str(Path(configuration_linformer.__file__)))
