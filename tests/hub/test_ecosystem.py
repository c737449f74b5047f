"""The family in the libraries that people use it with: pipelines, sentence-transformers, PEFT, int8, offloading."""

import copy

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from reference import BANDS, add_noise, name_of, tiny_batch, tiny_model
from sentence_transformers import SentenceTransformer

import linformer_hf
from linformer_hf import LinformerModel, modeling_linformer
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source


SHORT = "the old keeper walked over the river"
LONG = " ".join(["the painter stood under a mountain and a gardener walked quietly over the old stone"] * 12)
N = 48
PIPELINES = {
    "fill-mask": "LinformerForMaskedLM",
    "text-classification": "LinformerForSequenceClassification",
    "token-classification": "LinformerForTokenClassification",
    "feature-extraction": "LinformerModel",
}
CONVERTED = {
    "projection_type": "gated_pool",
    **BANDS[2],
    "length_correction": True,
}  # as `convert --calibrate` makes it
PER_HEAD = {"projection_type": "linear", "projection_sharing": "none"}
OFFLOADED = [
    {"projection_type": "linear"},
    PER_HEAD,
    {"projection_type": "linear", "projection_sharing": "layerwise"},
    {"projection_type": "conv", "projection_sharing": "none"},
    {"projection_type": "dense_conv", "projection_sharing": "none", "projected_length": 8, "local_window": 2},
    CONVERTED,
]


@pytest.fixture
def tokenizer(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["wordpiece"])
    tokenizer.model_max_length = N
    return tokenizer


def model_for(tokenizer, head: str, **options):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": N, "projected_length": 8}
    return tiny_model(getattr(linformer_hf, head), **{**sizes, "projection_type": "linear", **options})


def numbers(answer) -> list[float]:
    """Every number of a pipeline's answer, in order."""
    if isinstance(answer, dict):
        return [number for key in sorted(answer) for number in numbers(answer[key])]
    if isinstance(answer, list | tuple):
        return [number for part in answer for number in numbers(part)]
    return [float(answer)] if hasattr(answer, "__float__") else []


@pytest.mark.parametrize("task", PIPELINES)
def test_pipeline_reads_short_and_long_texts_and_batches(task, tokenizer):
    pipe = transformers.pipeline(task, model=model_for(tokenizer, PIPELINES[task]), tokenizer=tokenizer)
    texts = [SHORT, f"{SHORT} and {SHORT}", LONG]
    options = {"text-classification": {"truncation": True, "top_k": None}}.get(task, {})
    if task == "fill-mask":
        texts = [f"{tokenizer.mask_token} {text}" for text in texts]
        options = {"tokenizer_kwargs": {"truncation": True}, "top_k": 3}
    elif task == "feature-extraction":
        options = {"tokenize_kwargs": {"truncation": True}}
    assert len(tokenizer(texts[2])["input_ids"]) > N
    single = [numbers(pipe(text, **options)) for text in texts]
    batched = [numbers(answer) for answer in pipe(texts, batch_size=3, **options)]
    for alone, together in zip(single, batched, strict=True):
        assert alone
        # A batched row of feature-extraction comes with its padding behind it.
        torch.testing.assert_close(torch.tensor(together[: len(alone)]), torch.tensor(alone), atol=1e-4, rtol=1e-4)


def test_question_answering_finds_a_span_of_a_long_context(tokenizer):
    model = model_for(tokenizer, "LinformerForQuestionAnswering")
    encoded = tokenizer(SHORT, LONG, truncation="only_second", stride=8, return_overflowing_tokens=True, max_length=N)
    assert len(encoded["input_ids"]) > 2
    inputs = {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in encoded[name]], batch_first=True)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    with torch.no_grad():
        together = model(**inputs)
        for i, row in enumerate(encoded["input_ids"]):
            alone = model(**{name: tensor[i : i + 1, : len(row)] for name, tensor in inputs.items()})
            torch.testing.assert_close(
                together.start_logits[i, : len(row)], alone.start_logits[0], atol=1e-4, rtol=1e-4
            )


def test_zero_shot_classification(tokenizer):
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    model = model_for(tokenizer, "LinformerForSequenceClassification", num_labels=3, id2label=labels)
    model.config.label2id = {label: i for i, label in labels.items()}
    pipe = transformers.pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    alone = [pipe(text, ["river", "garden"]) for text in (SHORT, LONG)]
    together = pipe([SHORT, LONG], ["river", "garden"], batch_size=4)
    for one, other in zip(alone, together, strict=True):
        assert one["labels"] == other["labels"]
        assert sum(one["scores"]) == pytest.approx(1, abs=1e-4)
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


@pytest.fixture
def converted(tiny_source, tmp_path):
    """A converted encoder with band, gates and correction, none of them left at zero, and its folder."""
    source = tiny_source()
    model = convert_model(read_source(str(source)), projected_length=16, length_correction=True)
    assert model.config.local_window
    add_noise(model)
    model.save_pretrained(tmp_path / "converted")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "converted")
    return model.eval(), tmp_path / "converted"


def test_sentence_transformers_encodes_and_trains(converted):
    model, folder = converted
    encoder = SentenceTransformer(str(folder), device="cpu")  # the Transformer module and mean pooling
    encoder.max_seq_length = N
    texts = [SHORT, LONG]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts, padding=True, truncation=True, max_length=N, return_tensors="pt")
    with torch.no_grad():
        states, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
    by_hand = (states * mask).sum(1) / mask.sum(1)
    got = encoder.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(got, by_hand, atol=1e-5, rtol=1e-4)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3)
    encoder.train()
    for _ in range(2):
        one, other = encoder(dict(encoder.tokenize(texts)))["sentence_embedding"]
        torch.nn.functional.cosine_similarity(one, other, dim=0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (encoder.encode(texts, convert_to_tensor=True) - got).abs().max() > 1e-6


@pytest.mark.parametrize("projection", [{"projection_type": "linear"}, PER_HEAD, CONVERTED], ids=name_of)
def test_each_row_of_a_batch_may_have_its_own_adapter(projection):
    config = LoraConfig(r=2, target_modules=["query", "key", "value"], init_lora_weights=False)
    model, (ids, _, mask) = get_peft_model(tiny_model(**projection), config, adapter_name="a").eval(), tiny_batch()
    model.add_adapter("b", config)
    alone = {}
    with torch.no_grad():
        for name in ("a", "b"):
            model.set_adapter(name)
            alone[name] = model(input_ids=ids, attention_mask=mask).last_hidden_state
        names = ["a", "b", "b", "a", "b"]
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).last_hidden_state
    assert (alone["a"] - alone["b"]).abs().max() > 1e-3
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["position_embeddings"]},
        {"modules_to_save": ["position_embeddings"]},
        {"target_modules": [], "target_parameters": ["projection.weight"]},
    ],
)
def test_what_an_adapter_holds_of_n_positions_is_not_resized_without_it(options):
    options = {"target_modules": ["query"], **options}
    model, (ids, _, mask) = get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False, **options)), tiny_batch()
    before = model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    with pytest.raises(ValueError, match=r"an adapter holds [\w.]+ and would be lost, .* merge or unload"):
        model.base_model.model.resize_position_embeddings(2 * model.config.max_position_embeddings)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).last_hidden_state, before, rtol=0, atol=0)


def test_other_adapters_are_no_obstacle_to_a_resize():
    config = LoraConfig(target_modules=["query"], modules_to_save=["projection"], init_lora_weights=False)
    model, (ids, _, mask) = get_peft_model(tiny_model(), config).eval(), tiny_batch()
    n = 2 * model.config.max_position_embeddings
    model.base_model.model.resize_position_embeddings(n)
    assert model(input_ids=ids, attention_mask=mask).last_hidden_state.isfinite().all()
    assert {p.shape[-1] for name, p in model.named_parameters() if "projection" in name} == {n}


@pytest.mark.parametrize("projection", [{"projection_type": "linear"}, PER_HEAD, CONVERTED], ids=name_of)
def test_lora_with_trainable_projections_saves_loads_and_merges(projection, tmp_path):
    def fresh():
        return tiny_model(linformer_hf.LinformerForSequenceClassification, initializer_range=0.2, **projection)

    config = LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["projection", "classifier"], task_type="SEQ_CLS"
    )
    model, (ids, _, mask) = get_peft_model(fresh(), config), tiny_batch()
    with torch.no_grad():
        before = fresh()(ids, mask).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("projection" in name for name in trained)
    model.train()
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if name in trained and not torch.equal(p, trained[name])}
    assert moved == set(trained)
    model.eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert (expected - before).abs().max() > 1e-4
        loaded = PeftModel.from_pretrained(fresh(), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-6, rtol=1e-6)
        merged = loaded.merge_and_unload()
        assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(ids, mask).logits, expected, atol=1e-5, rtol=1e-5)


def test_padding_costs_lora_nothing(monkeypatch):
    """Its layers are local to a token: batches are packed as without it, and give what the plain path gives."""
    monkeypatch.setattr(modeling_linformer, "WORTH_PACKING", 1)
    config = LoraConfig(r=2, target_modules=["query", "value", "dense"], modules_to_save=["projection"])
    ids, _, mask = tiny_batch()
    packs = []
    remember = LinformerModel._packs
    monkeypatch.setattr(LinformerModel, "_packs", lambda *given: packs.append(remember(*given)) or packs[-1])

    def answer(change=lambda model: None):
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = tiny_model(initializer_range=0.2, **no_dropout, **CONVERTED)
        # In float64: the gradient of a cube in float32 differs by 2e-4 from one order of adding to another.
        model = get_peft_model(model, copy.deepcopy(config)).double().train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
        change(model)
        output = model(ids, attention_mask=mask).last_hidden_state
        output.pow(3).sum().backward()
        return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    def hook_inside(model):
        inside = model.get_submodule("base_model.model.encoder.layer.1.attention.self.query.lora_A.default")
        inside.register_forward_hook(lambda *given: None)

    packed, plain = answer(), answer(hook_inside)
    assert packs == [True, False]
    assert len(packed) == len(plain) > 20
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


EMBEDDINGS = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
ADAPTERS = {
    "LoRA on embeddings": LoraConfig(r=2, target_modules=EMBEDDINGS),
    "LoRA and single tokens": LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[3, 4]),
    "single tokens": TrainableTokensConfig(token_indices=[3, 4], target_modules=["word_embeddings"]),
    "LoRA on projections": LoraConfig(r=2, target_modules=[], target_parameters=["projection.weight"]),
    "LoRA on every linear layer": LoraConfig(r=2, target_modules="all-linear"),
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=["query", "dense"]),
    "modules to save": LoraConfig(
        r=2, target_modules=["query"], modules_to_save=["projection", "attention.output", "word_embeddings", "pooler"]
    ),
    "IA3": IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "prompt encoder": PromptEncoderConfig(num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("projection", [{"projection_type": "linear"}, CONVERTED], ids=name_of)
def test_adapters_train_are_saved_and_merged(projection, name, tmp_path):
    """Whatever module PEFT puts in another's place, nothing of ours looks into it."""

    def fresh():
        return tiny_model(
            linformer_hf.LinformerForSequenceClassification,
            initializer_range=0.2,
            **{"projection_type": "linear"} | projection,
        )

    config = copy.deepcopy(ADAPTERS[name])
    config.task_type = "SEQ_CLS"
    prompt = isinstance(config, PromptLearningConfig)
    model = get_peft_model(fresh(), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for length in (17, 3):  # with a prompt of 3 tokens, N; longer and shorter than K
        ids, _, mask = tiny_batch(length)
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, _, mask = tiny_batch(17)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        assert (expected - fresh()(ids, mask).logits).abs().max() > 1e-5
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(fresh(), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-6, rtol=1e-6)
        if not prompt:
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(ids, mask).logits, expected, atol=1e-5, rtol=1e-5)


def test_prefix_tuning_is_refused_with_the_reason():
    """BERT's prefixes are keys and values of single tokens; K slots have no place for them."""
    model = get_peft_model(
        tiny_model(linformer_hf.LinformerForSequenceClassification),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    )
    ids, _, mask = tiny_batch(10)
    with pytest.raises(ValueError, match="past key values"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("projection", OFFLOADED, ids=name_of)
def test_dynamic_int8_stays_near(projection):
    model = tiny_model(initializer_range=0.2, **projection)
    ids, _, mask = tiny_batch()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    assert type(quantized.encoder.layer[0].attention.self.key) is not torch.nn.Linear
    with torch.no_grad():
        wanted, got = (one(ids, mask).last_hidden_state[mask.bool()] for one in (model, quantized))
    error = float((got - wanted).norm() / wanted.norm())
    assert 1e-5 < error < 0.1


@pytest.mark.filterwarnings("ignore:.*meta device")
@pytest.mark.parametrize("way", ["cpu", "disk", "dispatch", "auto"])
@pytest.mark.parametrize("projection", OFFLOADED, ids=name_of)
def test_offloaded_weights_give_equal_outputs(projection, way, tmp_path):
    model = tiny_model(linformer_hf.LinformerForMaskedLM, **projection)
    batches = [(ids, mask) for ids, _, mask in (tiny_batch(20), tiny_batch(3))]  # longer and shorter than K
    with torch.no_grad():
        expected = [model(*given).logits for given in batches]
    if way == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif way == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    elif way == "dispatch":
        places = {"linformer.embeddings": "cpu", "linformer.encoder.layer.0": "disk"}
        places |= {"linformer.encoder.layer.1": "cpu", "cls": "cpu"}
        if model.linformer.encoder.projection is not None:
            places["linformer.encoder.projection"] = "disk"
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    else:
        model.save_pretrained(tmp_path / "model")
        room = {"cpu": sum(p.numel() for p in model.parameters()) * 2}  # half of the float32 weights
        model = type(model).from_pretrained(
            tmp_path / "model", device_map="auto", max_memory=room, offload_folder=tmp_path / "offload"
        )
        assert "disk" in model.hf_device_map.values()
    assert any(p.device.type == "meta" for p in model.parameters())
    with torch.no_grad():
        for given, wanted in zip(batches, expected, strict=True):
            real = given[1].bool()
            torch.testing.assert_close(model(*given).logits[real], wanted[real], atol=0, rtol=0)
