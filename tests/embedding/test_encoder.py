"""One pass over a document: whole documents as sentence-transformers encodes them, parts as their own states say."""

import json
import sys
import time

import pytest
import torch
import transformers
from reference import add_noise
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from helpers import ROOT
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.embedding.encoder import DocumentEncoder, sentence_spans


SHORT = "The old keeper walked over the river. Zoë stood under a stone! And the naïve painter?"
TEXTS = [SHORT, "a river", f"{SHORT} " * 3, "the garden " * 100, "", "a new lantern and the letter"]
MINILM = ROOT / ".cache" / "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def made(tiny_source, tmp_path_factory):
    """Saves a random sentence-transformers folder: pooling, further modules, prompts -> folder."""
    source = str(tiny_source())

    def save(pooling="mean", dense=False, normalize=False, prompts=None, **options):
        encoder = Transformer(source)
        modules = [encoder, Pooling(24, pooling, **options)]
        if dense:
            torch.manual_seed(1)
            modules.append(Dense(modules[1].pooling_output_dimension, 10))
        modules += [Normalize()] if normalize else []
        folder = tmp_path_factory.mktemp("folder")
        SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder))
        return folder

    return save


def loaded(folder, **options) -> DocumentEncoder:
    return DocumentEncoder.load(folder, device="cpu", **options)


def whole_vectors(encoder, texts, **options) -> torch.Tensor:
    reads = list(encoder.read(texts, **options))
    return torch.cat([encoder.vectors([read.states], encoder.prompt_length) for read in reads])


FOLDERS = {
    "mean": {},
    "max": {"pooling": "max"},
    "cls": {"pooling": "cls"},
    "last token": {"pooling": "lasttoken"},
    "weighted": {"pooling": "weightedmean"},
    "two poolings": {"pooling": ("mean", "max")},
    "dense, normalised": {"dense": True, "normalize": True},
    "cls, dense": {"pooling": "cls", "dense": True},
    "prompt": {"prompts": {"passage": "the letter: ", "query": "a: "}, "normalize": True},
    "prompt left out": {"prompts": {"document": "the letter: "}, "include_prompt": False},
    "prompt left out, weighted": {
        "prompts": {"document": "a letter: "},
        "include_prompt": False,
        "pooling": "weightedmean",
    },
}


@pytest.mark.parametrize("options", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_whole_documents_are_what_sentence_transformers_gives(made, options, batch_tokens):
    folder = made(**options)
    expected = SentenceTransformer(str(folder), device="cpu").encode_document(TEXTS, convert_to_tensor=True)
    got = whole_vectors(loaded(folder), TEXTS, batch_tokens=batch_tokens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_bare_linformer_is_averaged(tiny_source, tmp_path):
    source = tiny_source()
    model = convert_model(read_source(str(source)), max_length=96, projected_length=16, length_correction=True)
    add_noise(model)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    encoder = loaded(tmp_path)
    assert encoder.length == 96
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(whole_vectors(encoder, TEXTS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not MINILM.is_dir(), reason="make convert fetches all-MiniLM-L6-v2")
def test_the_real_minilm():
    encoder = loaded(MINILM)
    assert encoder.length == 256  # what its folder says; it has positions for 512
    assert loaded(MINILM, max_length=512).length == 512
    expected = encoder.model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(whole_vectors(encoder, TEXTS), expected, atol=1e-5, rtol=1e-5)


def test_what_is_read_and_what_is_lost(made):
    encoder = loaded(made())
    tokenizer = transformers.AutoTokenizer.from_pretrained(made())
    for text, read in zip(TEXTS, encoder.read(iter(TEXTS), batch_tokens=96), strict=True):
        full = tokenizer(text)["input_ids"]
        assert read.lost == max(0, len(full) - 48)
        assert read.ids.tolist() == (full if len(full) <= 48 else [*full[:47], full[-1]])
        assert read.states.shape == (len(read.ids), 24)
        assert read.offsets[[0, -1]].tolist() == [[0, 0], [0, 0]]
        words = [text[start:end] for start, end in read.offsets.tolist()[1:-1]]
        assert "".join(words) == "".join(text.split())[: len("".join(words))]


def test_documents_are_read_as_they_are_needed(made):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield SHORT

    reads = loaded(made()).read(endless(), batch_tokens=64)
    for _ in range(40):
        next(reads)
    assert len(taken) < 100


def test_one_long_document_pads_no_short_ones(made, monkeypatch):
    encoder = loaded(made())
    texts = ["a stone"] * 300 + ["the garden " * 100] + ["the river"] * 300
    once, preprocess, padded = list(encoder.read(texts)), type(encoder._encoder).preprocess, []

    def note(self, given, **options):
        found = preprocess(self, given, **options)
        padded.append(found["input_ids"].numel())
        return found

    monkeypatch.setattr(type(encoder._encoder), "preprocess", note)
    reads = list(encoder.read(texts, batch_tokens=64))
    assert max(padded) <= 2 * 8 * 64  # lengths are estimated
    for found, expected in zip(reads, once, strict=True):
        assert torch.equal(found.ids, expected.ids)
        assert torch.allclose(found.states, expected.states, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "the letter: "])
def test_pieces_are_the_means_of_their_tokens(made, prompt):
    encoder = loaded(made(prompts={"document": prompt}))
    for text, read in zip(TEXTS, encoder.read(TEXTS), strict=True):
        parts = encoder.pieces(read, 7)
        before = encoder.prompt_length or 1
        places = list(range(before, len(read.ids) - 1))
        assert [list(range(part.first, part.stop)) for part in parts] == [
            places[i : i + 7] for i in range(0, len(places), 7)
        ]
        assert [part.number for part in parts] == list(range(len(parts)))
        if not parts:
            assert text == ""
            continue
        vectors = encoder.vectors([read.states[part.first : part.stop] for part in parts])
        expected = torch.stack([read.states[part.first : part.stop].mean(0) for part in parts])
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
        joined = "".join("".join(text[part.start : part.end].split()) for part in parts)
        assert joined == "".join(text[: parts[-1].end].split())
        assert parts[0].start == 0


def test_a_piece_has_seen_the_whole_document(made):
    encoder = loaded(made())
    (read,), (alone,) = (list(encoder.read([text])) for text in (SHORT, SHORT[:14]))
    assert torch.equal(read.ids[:4], alone.ids[:4])
    assert (read.states[1:5] - alone.states[1:5]).abs().max() > 1e-3


def test_sentences_and_spans(made):
    encoder = loaded(made())
    text = f"{SHORT} " * 3
    (read,) = encoder.read([text])
    assert read.lost
    sentences = encoder.sentences(read, text)
    assert [part.number for part in sentences] == list(range(len(sentences)))
    assert text[sentences[0].start : sentences[0].end] == "The old keeper walked over the river."
    assert text[sentences[1].start : sentences[1].end] == "Zoë stood under a stone!"
    assert sentences[-1].end == int(read.offsets[-2, 1])  # the last one is cut where the reading ended
    for part in sentences:
        inside = [i for i, (start, end) in enumerate(read.offsets.tolist()) if end > part.start and start < part.end]
        assert inside == list(range(part.first, part.stop))
    spans = encoder.spans(read, [(4, 6), (3, 4), (0, len(text)), (len(text) - 5, len(text)), (0, 1)])
    assert [(part.number, text[part.start : part.end]) for part in spans[:1]] == [(0, "ol")]
    assert [part.number for part in spans] == [0, 2, 4]  # a space, and what was not read, have no token
    assert (spans[1].first, spans[1].stop) == (1, len(read.ids) - 1)


def test_the_rule_for_sentences():
    text = 'He said "Stop." Then e.g. this one… and so on! Dr. Who?\nA wrapped\nline.\n\nTitle\n\n'
    text += "End。iPhone。次の文\uff01続く 3.5 ok"
    assert [text[start:end] for start, end in sentence_spans(text)] == [
        'He said "Stop."',
        "Then e.g. this one… and so on!",
        "Dr.",
        "Who?",
        "A wrapped\nline.",
        "Title",
        "End。",
        "iPhone。",
        "次の文\uff01",
        "続く 3.5 ok",
    ]
    began = time.process_time()
    assert sentence_spans("Wait" + "." * 100_000 + "x") == [(0, 100_005)]
    assert time.process_time() - began < 10  # from each of the marks anew it takes minutes
    assert sentence_spans("  \n ") == []
    assert sentence_spans("no end") == [(0, 6)]


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", ("mean", "cls")])
def test_a_pooling_of_one_token_has_no_parts(made, pooling):
    encoder = loaded(made(pooling=pooling))
    (read,) = encoder.read([SHORT])
    for cut in (
        lambda: encoder.pieces(read, 8),
        lambda: encoder.sentences(read, SHORT),
        lambda: encoder.spans(read, []),
    ):
        with pytest.raises(ValueError, match=r"pooling is '(cls|lasttoken)'.*Take whole documents"):
            cut()
    assert encoder.whole(read) == (0, 0, len(read.ids), 0, len(SHORT))


def test_robertas_two_extra_rows_are_no_positions(tokenizers, tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tokenizer = tokenizers["byte_level_bpe"]
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=42, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = loaded(tmp_path)
    assert encoder.length == 42 - config.pad_token_id - 1
    (read,) = encoder.read(["the garden " * 100])
    assert len(read.ids) == encoder.length
    with pytest.raises(ValueError, match=rf"max_length=42 is more than the {encoder.length} positions"):
        loaded(tmp_path, max_length=42)


def test_the_fingerprint_is_of_what_makes_the_vectors(made, tmp_path):
    folder = made()
    used = loaded(folder)
    list(used.read(TEXTS))
    first = used.fingerprint()
    assert loaded(folder).fingerprint() == first
    others = [loaded(made(pooling="max")), loaded(folder, max_length=20), loaded(made(prompts={"document": "x"}))]
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    others.append(loaded(folder))
    assert len({first, *(other.fingerprint() for other in others)}) == 5


def test_weights_are_read_once(made, monkeypatch):
    """The check reads their names alone."""
    folder, load, devices = str(made()), transformers.PreTrainedModel.from_pretrained.__func__, []

    def noted(cls, *arguments, **options):
        model = load(cls, *arguments, **options)
        found = model[0] if isinstance(model, tuple) else model
        devices.append({parameter.device.type for parameter in found.parameters()})
        return model

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(noted))
    loaded(folder)
    assert sorted(devices, key=str) == [{"cpu"}, {"meta"}]


def test_what_holds_no_whole_encoder_is_refused(made, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        loaded(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' cannot be loaded"):
        loaded(tmp_path / "empty")
    folder = made(dense=True)
    with pytest.raises(ValueError, match="no prompt 'q'; it has"):
        loaded(folder, prompt_name="q")
    with pytest.raises(ValueError, match="max_length=2 leaves no token of a document: choose at least 3"):
        loaded(folder, max_length=2)
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing: encoder\.layer\.1\.output\.dense\.weight"):
        loaded(folder)
    save_file(weights | {"encoder.layer.1.output.dense.weight": lost}, folder / "model.safetensors", {"format": "pt"})
    loaded(folder)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="2_Dense has pickled weights only"):
        loaded(folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules[:2], {**modules[2], "type": "evil.Module"}]))
    with pytest.raises(ValueError, match=r"evil\.Module|pickled"):
        loaded(folder)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'linformer_hf\[ecosystem\]'"):
        loaded(folder)
