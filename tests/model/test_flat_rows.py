"""One row [1, T] of several documents, told apart by bounds or positions, is their padded batch without the padding."""

import copy
from contextlib import ExitStack

import pytest
import torch
from boundaries import Seen, build, hooked, names_of, patched, wrapped
from reference import BANDS, SHAPES, TYPES, name_of, tiny_batch, tiny_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import DataCollatorForTokenClassification, DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers import modeling_flash_attention_utils as flash

from linformer_hf import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    attention_linformer,
    modeling_linformer,
)


LENGTHS = [20, 3, 1, 9, 13]  # N is 20 and K is 5: whole, below K, a single token
T = sum(LENGTHS)
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def padded() -> dict[str, torch.Tensor]:
    ids, types, _ = tiny_batch()
    mask = (torch.arange(20) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}


REAL = padded()["attention_mask"].bool()
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
POSITIONS = REAL.nonzero()[:, 1][None]
DOCUMENT = REAL.nonzero()[:, 0].int()[None]
LENGTH = {"max_length_q": 20, "max_length_k": 20}
TOLD = {
    "positions": {"position_ids": POSITIONS},
    "positions of one dimension": {"position_ids": POSITIONS[0]},
    "bounds": {"cu_seq_lens_q": BOUNDS},
    "bounds of keys": {"cu_seq_lens_k": BOUNDS, **LENGTH},
    "numbers": {"seq_idx": DOCUMENT},
    "all": {
        **{"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, **LENGTH},
        **{"seq_idx": DOCUMENT, "position_ids": POSITIONS, "attention_mask": torch.ones(1, T)},
    },
}


def flat(told: str = "bounds") -> dict[str, torch.Tensor]:
    rows = padded()
    return {
        "input_ids": rows["input_ids"][REAL][None],
        "token_type_ids": rows["token_type_ids"][REAL][None],
        **TOLD[told],
    }


def assert_near(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(params=[False, True], ids=["whole", "packed"])
def packed(request, monkeypatch):
    """The padded batch packed in small blocks, where it can be, and not at all."""
    if request.param:
        for module in (attention_linformer, modeling_linformer):
            monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(modeling_linformer, "WORTH_PACKING", 1 if request.param else 1000)
    monkeypatch.setattr(modeling_linformer, "WORTH_BLOCKS", 1 if request.param else 1000)
    return request.param


def answer(model, given: dict) -> tuple[torch.Tensor, ...]:
    """States [T, C] and what the pooler gives, [documents, C]; in training also every gradient of a loss of them."""
    output = model(**given)
    states = output.last_hidden_state
    states = states[REAL] if states.shape[0] == len(LENGTHS) else states[0]
    if not torch.is_grad_enabled():
        return states, output.pooler_output
    model.zero_grad()
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
    ((states * weights).sum() + output.pooler_output.pow(2).sum()).backward()
    return states, output.pooler_output, *(parameter.grad for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", SHAPES, ids=name_of)
def test_a_flat_row_is_the_padded_batch_of_its_documents(variant, attention, packed):
    model = tiny_model(**variant, **QUIET, seed=1).double()  # the blocks of two paths round differently
    model.set_attn_implementation(attention)
    for training in (False, True):
        model.train(training)
        with torch.set_grad_enabled(training):
            wanted = answer(model, padded())
            for told in ("positions", "all") if training else TOLD:
                assert_near(answer(model, flat(told)), wanted)


@pytest.mark.parametrize("variant", TYPES, ids=name_of)
def test_every_document_of_a_flat_row_is_as_if_it_were_alone(variant):
    model = tiny_model(**variant)
    with torch.no_grad():
        states, pooled = answer(model, flat("positions"))
        for i, part in enumerate(states.split(LENGTHS)):
            given = {name: flat()[name][:, BOUNDS[i] : BOUNDS[i + 1]] for name in ("input_ids", "token_type_ids")}
            alone = model(**given)
            assert_near((part, pooled[i]), (alone.last_hidden_state[0], alone.pooler_output[0]))


def test_positions_of_ones_own_are_those_of_each_document():
    model, places = tiny_model(), (POSITIONS * 2) % 20
    wanted = model(**padded(), position_ids=torch.zeros_like(REAL, dtype=torch.long).masked_scatter(REAL, places))
    found = model(**{**flat(), "position_ids": places})
    assert_near(found.last_hidden_state[0], wanted.last_hidden_state[REAL])


def test_hidden_states_maps_embeddings_and_tuples():
    model = tiny_model()
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    wanted, found = model(**padded(), **asked), model(**flat("all"), **asked)
    assert found.pooler_output.shape == (5, 16)
    for states, states_padded in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert_near(states, states_padded[REAL][None])
    for maps, maps_padded in zip(found.attentions, wanted.attentions, strict=True):
        assert_near(maps, maps_padded.transpose(1, 2)[REAL].transpose(0, 1)[None])  # [1, H, T, K]
    assert_near(model(**flat(), return_dict=False), (found.last_hidden_state, found.pooler_output))
    given, embeddings = flat(), []
    for ids in (given.pop("input_ids"), padded()["input_ids"]):
        embeddings.append(model.get_input_embeddings()(ids).detach().requires_grad_())
    states = model(inputs_embeds=embeddings[0], **given).last_hidden_state
    assert_near(states, found.last_hidden_state)
    states.pow(3).sum().backward()
    rest = {**padded(), "input_ids": None, "inputs_embeds": embeddings[1]}
    model(**rest).last_hidden_state.pow(3).sum().backward()
    assert_near(embeddings[0].grad[0], embeddings[1].grad[REAL])


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("variant", [{}, {"projection_type": "gated_pool", **BANDS[2]}], ids=["linear", "band"])
def test_gradient_checkpointing(variant, reentrant, packed):
    model = tiny_model(**variant, **QUIET).double().train()
    wanted = answer(model, padded())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_near(answer(model, flat()), wanted)


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(T).clamp(max=19),  # nothing falls back to the beginning
        torch.arange(T) % 20 // 2 + 1 - (torch.arange(T) == 0).long(),  # falls, but not to where the row began
        torch.zeros(T, dtype=torch.long),
        (T - torch.arange(T)).clamp(max=19),
    ],
    ids=["rising", "falling elsewhere", "alike", "backwards"],
)
def test_other_positions_are_one_text(positions):
    model = tiny_model(max_position_embeddings=T, projected_length=5)
    lengths = []
    model.encoder.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[:2]))
    ids = flat()["input_ids"]
    model(ids, position_ids=positions[None])
    model(ids, position_ids=POSITIONS, attention_mask=torch.ones(1, T))  # a mask says it: real tokens of one text
    model(ids.expand(2, -1), position_ids=POSITIONS)
    assert lengths == [(1, T), (1, T), (2, T)]


def test_documents_without_tokens_and_a_row_of_one_document():
    model, given = tiny_model(), flat()
    holes = torch.tensor([0, 0, 20, 23, 23, 24, 33, 46, 46])
    found = model(**{**given, "cu_seq_lens_q": holes})
    assert found.pooler_output.shape == (8, 16)
    assert_near(found.last_hidden_state, model(**given).last_hidden_state)
    one = {name: given[name][:, :20] for name in ("input_ids", "token_type_ids")}
    assert_near(model(**one, cu_seq_lens_q=torch.tensor([0, 20])).pooler_output, model(**one).pooler_output)


# Heads


LABELS = torch.randint(0, 3, (5, 20), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("told", ["positions", "all"])
@pytest.mark.parametrize("head", [LinformerForMaskedLM, LinformerForTokenClassification])
def test_heads_of_tokens_take_flat_labels(head, told):
    model = tiny_model(head, num_labels=3, **QUIET).train()
    found = model(**flat(told), labels=LABELS[REAL][None])
    wanted = model(**padded(), labels=LABELS)
    assert_near(found.loss, wanted.loss)
    logits = model.eval()(**flat(told)).logits
    assert_near(logits, model(**padded()).logits[REAL][None])


@pytest.mark.parametrize("told", ["positions", "all"])
@pytest.mark.parametrize(
    ("options", "labels"),
    [({}, LABELS[:, 0]), ({"problem_type": "regression"}, LABELS[:, :3].float()), ({}, (LABELS[:, :3] > 0).float())],
    ids=["classes", "regression", "multi-label"],
)
def test_sequence_classification_gives_a_row_of_logits_for_each_document(options, labels, told):
    model = tiny_model(LinformerForSequenceClassification, num_labels=3, **options)
    found, wanted = model(**flat(told), labels=labels), model(**padded(), labels=labels)
    assert found.logits.shape == (5, 3)
    assert_near((found.logits, found.loss), (wanted.logits, wanted.loss))
    with pytest.raises(ValueError, match=r"labels.*(\[5\]|\[5, 3\])"):
        model(**flat(told), labels=labels[:1])


@pytest.mark.parametrize("told", ["positions", "all"])
def test_question_answering_gives_logits_and_refuses_answers(told):
    model = tiny_model(LinformerForQuestionAnswering)
    assert_near(model(**flat(told)).start_logits, model(**padded()).start_logits[REAL][None])
    with pytest.raises(ValueError, match=r"start_positions cannot tell which document.*attention_mask"):
        model(**flat(told), start_positions=torch.tensor([3]), end_positions=torch.tensor([4]))


def test_choices_are_no_documents():
    model, given = tiny_model(LinformerForMultipleChoice), flat()
    ids = given["input_ids"][None]
    for told in ({"cu_seq_lens_q": BOUNDS}, {"position_ids": POSITIONS[None]}):
        with pytest.raises(ValueError, match=r"A choice cannot tell which document.*attention_mask"):
            model(ids, **told)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q.*2 rows"):
        model(ids.expand(1, 2, -1), cu_seq_lens_q=BOUNDS)


# Boundaries of modules


@pytest.mark.parametrize("way", [wrapped, patched, hooked], ids=lambda way: way.__name__)
@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_every_module_that_somebody_changed_is_called_as_for_the_padded_batch(way, gradients):
    made, given = build(max_position_embeddings=20, projected_length=5), [padded(), flat()]
    for name in names_of(made):
        found = []
        for inputs in given:
            with ExitStack() as stack:
                model, seen = copy.deepcopy(made), Seen()
                way(model, name, seen, stack)
                stack.enter_context(torch.set_grad_enabled(gradients))
                found.append((answer(model, inputs)[:2], [tensor.shape for call in seen for tensor, _ in call]))
                assert all(torch.equal(tensor, before) for call in seen for tensor, before in call), name
        (wanted, shapes), (ours, shapes_flat) = found
        assert_near(ours, wanted)
        assert shapes, name
        assert shapes_flat == shapes, name


def test_whoever_hooks_the_model_sees_the_flat_row():
    model, seen = tiny_model(LinformerForTokenClassification), []
    model.linformer.register_forward_hook(
        lambda _, given, kwargs, output: seen.append((given[0], kwargs, output)), with_kwargs=True
    )
    model(**flat())
    (ids, kwargs, output) = seen[0]
    assert ids.shape == (1, T)
    assert kwargs["cu_seq_lens_q"] is BOUNDS
    assert output.last_hidden_state.shape == (1, T, 16)


# The collator and the libraries that flatten


ROWS = [
    {"input_ids": ids[real].tolist(), "labels": [-100, *labels[real].tolist()[1:]]}
    for ids, labels, real in zip(padded()["input_ids"], LABELS, REAL, strict=True)
]


def one_step(model, collator, folder) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=5,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS, data_collator=collator)
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    return {"loss": torch.tensor(evaluated), **{name: weight.detach() for name, weight in model.named_parameters()}}


@pytest.mark.parametrize("arguments", [False, True], ids=["positions", "flash arguments"])
@pytest.mark.parametrize("head", [LinformerForMaskedLM, LinformerForTokenClassification])
def test_a_step_with_the_flattening_collator_is_that_of_the_padded_batch(head, arguments, tokenizers, tmp_path):
    model = tiny_model(head, num_labels=3, initializer_range=0.2, **QUIET)
    flattening = DataCollatorWithFlattening(return_flash_attn_kwargs=arguments, return_seq_idx=arguments)
    assert ("cu_seq_lens_q" in flattening(ROWS)) == arguments
    wanted = one_step(model, DataCollatorForTokenClassification(tokenizers["wordpiece"]), tmp_path)
    found = one_step(model, flattening, tmp_path)
    for name in wanted:
        assert_near(found[name], wanted[name])
    moved = max((wanted[name] - weight).abs().max() for name, weight in model.named_parameters())
    assert moved > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean"])
def test_sentence_transformers_flattens_its_inputs(pooling, tokenizers, tmp_path, monkeypatch):
    """As it does where a flash implementation is asked for and installed: its own code makes and pools the row."""
    tokenizer = tokenizers["wordpiece"]
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["the old keeper walked over the river", "a stone", "the gardener walked quietly under a mountain"]

    def encoder():
        body = Transformer(str(tmp_path))
        body.max_seq_length = 20
        return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), pooling)], device="cpu")

    wanted = encoder().encode(texts, convert_to_tensor=True)
    monkeypatch.setattr(Transformer, "_is_flash_attention_requested", lambda _: True)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: ((None, print), None))
    flattening, seen = encoder(), []
    assert flattening[0].can_flatten_inputs
    flattening[0].register_forward_hook(lambda _, given, features: seen.append(features))
    assert_near(flattening.encode(texts, convert_to_tensor=True), wanted)
    assert len(seen[0]["cu_seq_lens_q"]) == 4
    assert seen[0]["token_embeddings"].shape[:2] == (1, seen[0]["cu_seq_lens_q"][-1])


# Bad input, and where numbers cannot be read


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"cu_seq_lens_q": BOUNDS[:-1]}, "cu_seq_lens_q goes from 0 to 33.*0 to the row's 46 tokens"),
        ({"cu_seq_lens_q": BOUNDS + 1}, "cu_seq_lens_q goes from 1 to 47.*46"),
        ({"cu_seq_lens_k": torch.tensor([0, 20, 19, 46])}, "cu_seq_lens_k falls from 20 to 19; it must rise"),
        ({"cu_seq_lens_q": BOUNDS[None]}, r"cu_seq_lens_q.*\[documents \+ 1\].*\[1, 6\]"),
        ({"cu_seq_lens_q": BOUNDS[:1]}, r"cu_seq_lens_q.*\[documents \+ 1\].*\[1\]"),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": torch.tensor([0, 20, 46])}, "cu_seq_lens_q and.*_k differ"),
        ({"cu_seq_lens_q": BOUNDS, "max_length_q": 19}, "a document of 20 tokens, but max_length_q is 19"),
        ({"cu_seq_lens_q": torch.tensor([0, 20, 46])}, "26 tokens.*max_position_embeddings=20.*Truncate"),
        ({"position_ids": torch.arange(T) % 23}, "23 tokens.*max_position_embeddings=20"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": POSITIONS.clamp(max=1)}, "attention_mask holds 0.*no padding"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, T, T)}, r"attention_mask must be.*\[1, 46\]"),
        ({"seq_idx": DOCUMENT[:, 1:]}, r"seq_idx must be of shape \[1, 46\] or \[46\], got \[1, 45\]"),
        ({"cu_seq_lens_q": BOUNDS, "token_type_ids": POSITIONS[:, 1:]}, r"token_type_ids.*\[1, 46\].*\[1, 45\]"),
        ({"max_length_q": 20}, "max_length_q cannot be used: alone.*give cu_seq_lens_q"),
        ({"cu_seqlens": BOUNDS}, "cu_seqlens cannot be used.*cu_seq_lens_q and max_length_q"),
        ({"seq_idx": DOCUMENT.expand(2, -1), "input_ids": torch.ones(2, T).long()}, "seq_idx tells.*2 rows"),
        ({"cu_seq_lens_q": BOUNDS, "input_ids": torch.ones(2, T).long()}, "cu_seq_lens_q.*2 rows.*attention_mask"),
    ],
)
def test_bad_bounds_are_refused_with_value_limit_and_way_out(told, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{"input_ids": flat()["input_ids"], **told})


def test_in_graphs_and_under_torch_func_bounds_are_refused():
    model = tiny_model()
    given = {"input_ids": flat()["input_ids"][:, :20], "cu_seq_lens_q": torch.tensor([0, 5, 20])}
    for compute in (
        lambda: torch.compile(model, backend="eager")(**given),
        lambda: torch.export.export(model, (), given),
        lambda: torch.func.vmap(lambda bounds: model(given["input_ids"], cu_seq_lens_q=bounds)[0])(BOUNDS[None]),
    ):
        with pytest.raises(Exception, match=r"cu_seq_lens_q cannot be used: in a graph.*attention_mask"):
            compute()
    tiny_model().to("meta")(given["input_ids"].to("meta"), position_ids=torch.zeros(1, 20).long().to("meta"))
