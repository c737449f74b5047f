"""Ways from a document to vectors, beside the encoders themselves."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.evaluation.methods import OnePass, PiecesAlone, read_models, read_source_methods


TEXT = "the old keeper walked over the river and the painter stood under a stone " * 4


@pytest.fixture(scope="module")
def folder(tiny_source):
    return str(tiny_source())


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory) -> str:
    """The source at N = 96, exact up to 48 tokens."""
    place = tmp_path_factory.mktemp("converted")
    source = read_source(folder)
    convert_model(source, 96).save_pretrained(place)
    source.tokenizer.model_max_length = 96
    source.tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def found(folder):
    return read_source_methods(folder, 96, [16, 48], full=True)


def test_the_sources_ways_are_its_beginning_its_pieces_and_all(found):
    _, methods = found
    assert [method.name for method in methods] == ["first", "pieces-16", "pieces-48", "full"]
    assert [method.length for method in methods] == [None, None, None, 96]
    assert all(method.reads_queries is methods[0] for method in methods[:3])
    assert isinstance(methods[3], OnePass)


def test_pieces_are_what_sentence_transformers_encodes(found, folder):
    source, (first, pieces, *_) = found
    theirs = SentenceTransformer(folder, device="cpu")
    theirs.max_seq_length = 48
    assert torch.allclose(first.read(TEXT)["whole"][0], torch.tensor(theirs.encode(TEXT)), atol=1e-5)
    ids = source.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    read = pieces.read(TEXT)["16"]
    assert len(read) == -(-len(ids) // 14)
    tokenizer = source.tokenizer
    for start, vector in zip(range(0, len(ids), 14), read, strict=True):
        row = torch.tensor([[tokenizer.cls_token_id, *ids[start : start + 14], tokenizer.sep_token_id]])
        with torch.no_grad():
            wanted = source.reference(row).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, wanted, atol=1e-5)


def test_more_pieces_than_a_batch_are_all_read(found, monkeypatch):
    _, (_, pieces, *_) = found
    whole = pieces.read(TEXT)["16"]
    monkeypatch.setattr("linformer_hf.evaluation.methods.BATCH", 2)
    assert torch.allclose(pieces.read(TEXT)["16"], whole, atol=1e-5)


def test_one_pass_is_pooled_over_all_and_over_the_same_pieces(found, converted):
    source, methods = found
    (model,) = read_models(source, {"mine": converted}, 96, [16, 48])
    read = model.read(TEXT)
    assert list(read) == ["whole", "16", "48"]
    ids = source.tokenizer(TEXT, truncation=True, max_length=96, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.encoder.model[0].model(ids).last_hidden_state[0]
    assert torch.allclose(read["whole"][0], states.mean(0), atol=1e-5)
    assert torch.allclose(read["16"], torch.stack([p.mean(0) for p in states[1:-1].split(14)]), atol=1e-5)
    short = " ".join(TEXT.split()[:12])
    assert torch.allclose(
        model.read(short)["whole"], methods[0].read(short)["whole"], atol=1e-4
    )  # exact, and as `full`
    assert torch.allclose(methods[3].read(short)["whole"], methods[0].read(short)["whole"], atol=1e-4)
    assert len(methods[1].read(short)["16"]) == len(
        read_models(source, {"m": converted}, 96, [16])[0].read(short)["16"]
    )
    assert list(model.reads_queries.read(short)) == ["whole"]


def test_vectors_are_known_by_the_weights(found, converted):
    source, methods = found
    (model,) = read_models(source, {"mine": converted}, 96, [16, 48])
    (again,) = read_models(source, {"other name": converted}, 96, [16, 48])
    assert model.facts == again.facts
    with torch.no_grad():
        next(again.encoder.model[0].model.parameters())[0, 0] += 1
    assert OnePass("mine", again.encoder, [16, 48]).facts != model.facts
    assert len({str(method.facts) for method in [*methods, model, model.reads_queries]}) == 6


def test_what_reads_too_little_is_refused(found, converted):
    source, _ = found
    with pytest.raises(ValueError, match=r"models.mine: .* reads 96 tokens, .* up to 100. .*--max-length 100"):
        read_models(source, {"mine": converted}, 100, [16])


def test_another_vocabulary_is_refused(found, converted, tmp_path):
    source, _ = found
    from transformers import AutoTokenizer

    from linformer_hf import LinformerModel

    LinformerModel.from_pretrained(converted).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokenizer.add_tokens(["lighthouse"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another vocabulary .* than the source .* cannot be compared"):
        read_models(source, {"mine": str(tmp_path)}, 96, [16])


def test_what_is_no_encoder_is_refused(found, tmp_path, converted):
    source, _ = found
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_models(source, {"mine": str(tmp_path)}, 96, [16])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_models(source, {"mine": str(tmp_path / "none")}, 96, [16])
    with pytest.raises(ValueError, match="is a Linformer already"):
        read_source_methods(converted, 96, [16], full=False)


def test_a_piece_longer_than_the_source_is_refused(folder):
    with pytest.raises(ValueError, match=r"pieces of 64 tokens are more than the source .* reads, 48"):
        read_source_methods(folder, 96, [16, 64], full=False)


def test_a_source_that_normalises_gives_pieces_of_length_1(folder, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    modules = [Transformer(folder), Pooling(24, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path))
    _, (first, pieces) = read_source_methods(str(tmp_path), 96, [16], full=False)
    assert isinstance(pieces, PiecesAlone)
    for vectors in (first.read(TEXT)["whole"], pieces.read(TEXT)["16"]):
        assert torch.allclose(vectors, normalize(vectors, dim=-1), atol=1e-6)
