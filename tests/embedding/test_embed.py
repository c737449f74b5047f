"""`linformer-hf embed`: what is in the file, what a stopped run goes on with, and what is refused."""

import json
import logging
import multiprocessing
import shutil
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

import linformer_hf
from helpers import error_line, tree
from killing import victim
from linformer_hf import cli
from linformer_hf.embedding import embed as module
from linformer_hf.embedding.encoder import DocumentEncoder
from waiting import HANG


N = 48
PARTS = {"batch_tokens": 8}  # three documents in each finished part


@pytest.fixture(scope="module")
def folder(tiny_source, tmp_path_factory):
    """Saves a random sentence-transformers folder."""
    source = str(tiny_source(max_position_embeddings=N))

    def save(pooling="mean", prompts=None, **options):
        place = tmp_path_factory.mktemp("folder")
        modules = [Transformer(source), Pooling(24, pooling, **options), Normalize()]
        SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(place))
        return place

    return save


@pytest.fixture(scope="module")
def model(folder):
    return folder()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["The old river. A stone!", "", "the garden " * 60, "a letter"]
    spans = [[[0, 14], [4, 7], [15, 23]], [], [[0, 10], [600, 640]], []]
    lines = [json.dumps({"body": text, "where": where}) for text, where in zip(texts, spans, strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def embed(folder, files, output, **options):
    return pq.read_table(linformer_hf.embed(folder, files, output=output, device="cpu", **options)).to_pylist()


def read(folder, text):
    (found,) = DocumentEncoder.load(folder, device="cpu").read([text])
    return found


def test_the_command_line_writes_one_vector_for_each_document(model, texts, tmp_path, capsys, caplog):
    output = tmp_path / "new" / "vectors.parquet"
    assert cli.main(["embed", str(model), str(texts), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"vectors: {output}"
    assert "- documents: 12\n" in printed
    table = pq.read_table(output)
    assert [str(field.type) for field in table.schema] == [
        *("string", "int32", "int64", "int64", "int32"),
        "fixed_size_list<element: float>[24]",
    ]
    files = sorted(texts.iterdir())
    assert table["document"].to_pylist() == [str(file) for file in files]
    contents = [file.read_text(encoding="utf-8") for file in files]
    expected = SentenceTransformer(str(model), device="cpu").encode(contents)
    np.testing.assert_allclose(np.stack(table["vector"].to_pylist()), expected, atol=1e-5)
    assert set(table["tokens"].to_pylist()) == {N}
    assert list(output.parent.iterdir()) == [output]


def test_documents_that_are_cut_are_told_in_one_line(model, rows, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = embed(model, rows, tmp_path / "v.parquet", column="body")
    lost = len(SentenceTransformer(str(model), device="cpu").tokenizer("the garden " * 60)["input_ids"]) - N
    line = f"1 of 4 documents are longer than 48 tokens: {lost} tokens were cut off."
    assert [record.getMessage()[: len(line)] for record in caplog.records if "documents" in record.getMessage()] == [
        line
    ]
    assert [row["document"] for row in found] == [f"{rows}:{i}" for i in (1, 3, 4)]  # the second is empty
    assert found[1]["end"] < len("the garden " * 60)
    text, line = module.told(tmp_path / "v.parquet")
    assert f"- tokens cut off: {lost}" in text
    assert "- of them without text, and so without a vector: 1\n" in text
    assert line == f"vectors: {tmp_path / 'v.parquet'}"


@pytest.mark.parametrize("prompts", [None, {"document": "the letter: "}], ids=["no prompt", "prompt"])
def test_late_pieces_are_the_means_of_their_tokens_in_one_pass(folder, rows, tmp_path, prompts):
    model = folder(prompts=prompts)
    found = embed(model, rows, tmp_path / "v.parquet", column="body", pieces=5)
    text = "The old river. A stone!"
    states = read(model, text).states
    before = DocumentEncoder.load(model, device="cpu").prompt_length or 1
    pieces = [row for row in found if row["document"].endswith(":1")]
    assert [row["piece"] for row in pieces] == list(range(len(pieces)))
    assert sum(row["tokens"] for row in pieces) == len(states) - 1 - before
    for i, row in enumerate(pieces):
        mean = states[before + 5 * i : before + 5 * i + row["tokens"]].mean(0)
        expected = torch.nn.functional.normalize(mean, dim=0)
        torch.testing.assert_close(torch.tensor(row["vector"]), expected, atol=1e-5, rtol=1e-5)
    joined = "".join(text[row["start"] : row["end"]].replace(" ", "") for row in pieces)
    assert joined == text.replace(" ", "")


def test_sentences_and_given_spans(model, rows, tmp_path):
    sentences = embed(model, rows, tmp_path / "s.parquet", column="body", sentences=True)
    assert [(row["start"], row["end"]) for row in sentences[:2]] == [(0, 14), (15, 23)]
    spans = embed(model, rows, tmp_path / "v.parquet", column="body", spans="where")
    assert [(row["document"][-2:], row["piece"]) for row in spans] == [(":1", 0), (":1", 1), (":1", 2), (":3", 0)]
    assert (spans[0]["vector"], spans[2]["vector"]) == (sentences[0]["vector"], sentences[1]["vector"])
    assert "without a token that was read, and so without a vector: 1\n" in module.told(tmp_path / "v.parquet")[0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("prompts", [None, {"document": "the letter: "}], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("cut", [{"pieces": 5}, {"sentences": True}, {"spans": "where"}], ids=str)
def test_parts_alone_are_documents_of_their_own(folder, rows, tmp_path, pooling, prompts, cut):
    """As sentence-transformers encodes their characters: any pooling, and documents of any length."""
    model = folder(pooling, prompts=prompts)
    found = embed(model, rows, tmp_path / "v.parquet", column="body", alone=True, **cut)
    texts = {f"{rows}:{i}": json.loads(line)["body"] for i, line in enumerate(rows.open(encoding="utf-8"), 1)}
    parts = [texts[row["document"]][row["start"] : row["end"]] for row in found]
    expected = SentenceTransformer(str(model), device="cpu").encode_document(parts)
    np.testing.assert_allclose([row["vector"] for row in found], expected, atol=1e-5)
    told = module.told(tmp_path / "v.parquet")[0]
    if "pieces" in cut:
        assert {row["tokens"] for row in found[:-1]} >= {5}
        assert max(row["end"] for row in found) == len(("the garden " * 60).rstrip())  # behind what one pass reads
        assert "cut" not in told
    elif "spans" in cut:  # the fourth, which one pass does not reach, has a vector too
        assert [(row["document"][-2:], row["piece"]) for row in found] == [(":1", i) for i in range(3)] + [
            (":3", i) for i in range(2)
        ]
        assert "without a token" not in told


@pytest.mark.parametrize("cut", [{"pieces": 5}, {"sentences": True}, {"spans": "where"}], ids=str)
def test_a_blended_part_lies_half_way_between_its_two_readings(folder, rows, tmp_path, cut):
    model = folder("mean", prompts={"document": "the letter: "})
    ways = {
        way: embed(model, rows, tmp_path / f"{way}.parquet", column="body", **{way: True}, **cut)
        for way in ("alone", "blend")
    }
    ways["late"] = embed(model, rows, tmp_path / "late.parquet", column="body", **cut)
    one, two, blended = (
        {tuple(row[key] for key in ("document", "piece", "start", "end")): np.array(row["vector"]) for row in ways[way]}
        for way in ("late", "alone", "blend")
    )
    assert blended.keys() == one.keys()  # a part that one pass does not reach has no half of it
    cut_off = one.keys() - two.keys()  # the last one that is read, shorter than alone
    assert len(cut_off) == ("spans" not in cut)
    rows_of = [{key: row[key] for key in ("piece", "start", "end", "tokens")} for row in ways["blend"]]
    assert rows_of == [{key: row[key] for key in ("piece", "start", "end", "tokens")} for row in ways["late"]]
    for key in blended.keys() - cut_off:
        vector = blended[key]
        lengths = [np.linalg.norm(each[key]) for each in (one, two)]
        half = one[key] / lengths[0] + two[key] / lengths[1]
        np.testing.assert_allclose(vector, half / np.linalg.norm(half) * np.mean(lengths), atol=1e-5)
    assert max(np.abs(one[key] - two[key]).max() for key in one.keys() - cut_off) > 1e-2
    told = [module.told(tmp_path / f"{way}.parquet")[0].splitlines() for way in ("late", "alone", "blend")]
    if "pieces" in cut:  # the longest document, which is cut
        assert "- documents that were cut: 1" in told[2]
        assert "cut" not in "".join(told[1])
    assert [line for line in told[0] if "spans" in line] == [line for line in told[2] if "spans" in line]


def test_the_parts_of_a_long_document_are_pooled_some_at_a_time(model, rows, tmp_path, monkeypatch):
    at_once = embed(model, rows, tmp_path / "one.parquet", column="body", pieces=5, alone=True)
    pooled, vectors = [], DocumentEncoder.vectors
    monkeypatch.setattr(module, "POOLED_TOKENS", 20)
    monkeypatch.setattr(
        DocumentEncoder, "vectors", lambda self, parts, *more: pooled.append(len(parts)) or vectors(self, parts, *more)
    )
    found = embed(model, rows, tmp_path / "v.parquet", column="body", pieces=5, alone=True)
    assert [row["document"] for row in found] == [row["document"] for row in at_once]
    np.testing.assert_allclose([row["vector"] for row in found], [row["vector"] for row in at_once], atol=1e-6)
    assert max(pooled) <= 4
    assert sum(pooled) == len(found)
    assert module.told(tmp_path / "v.parquet")[0] == module.told(tmp_path / "one.parquet")[0]


def test_a_part_alone_that_is_too_long_is_told(model, rows, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        embed(model, rows, tmp_path / "v.parquet", column="body", sentences=True, alone=True)
    assert "1 of 4 documents hold parts that are longer than 48 tokens" in caplog.text


def test_alone_is_another_run_than_one_pass(model, rows, tmp_path):
    embed(model, rows, tmp_path / "v.parquet", column="body", pieces=5, alone=True)
    with pytest.raises(FileExistsError, match="made from something else"):
        embed(model, rows, tmp_path / "v.parquet", column="body", pieces=5)


def test_what_alone_cannot_mean_is_refused(model, folder, rows, tmp_path):
    with pytest.raises(ValueError, match="--alone and --blend exclude each other"):
        embed(model, rows, tmp_path / "v.parquet", column="body", pieces=5, alone=True, blend=True)
    with pytest.raises(ValueError, match="--blend would have no effect on whole documents"):
        embed(model, rows, tmp_path / "v.parquet", column="body", blend=True)
    with pytest.raises(ValueError, match="leaves no room"):
        embed(model, rows, tmp_path / "v.parquet", column="body", blend=True, pieces=47)
    with pytest.raises(ValueError, match="pooling is 'cls'"):
        embed(folder("cls"), rows, tmp_path / "v.parquet", column="body", blend=True, sentences=True)
    with pytest.raises(ValueError, match="--alone would have no effect on whole documents"):
        embed(model, rows, tmp_path / "v.parquet", column="body", alone=True)
    with pytest.raises(ValueError, match=r"--pieces=47 leaves no room .* at most 46"):
        embed(model, rows, tmp_path / "v.parquet", column="body", pieces=47, alone=True)
    with pytest.raises(ValueError, match=r"read each part by itself \(--alone\)"):
        embed(folder("cls"), rows, tmp_path / "v.parquet", column="body", pieces=5)


@pytest.mark.parametrize("included", [True, False])
def test_a_prompt_is_chosen_by_its_name(folder, rows, tmp_path, included):
    model = folder(prompts={"document": "", "letter": "the letter: "}, include_prompt=included)
    found = embed(model, rows, tmp_path / "v.parquet", column="body", prompt_name="letter")
    expected = SentenceTransformer(str(model), device="cpu").encode_document("a letter", prompt_name="letter")
    np.testing.assert_allclose(found[-1]["vector"], expected, atol=1e-5)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(model, texts, tmp_path, monkeypatch, caplog):
    whole, output = tmp_path / "whole.parquet", tmp_path / "v.parquet"
    embed(model, texts, whole, pieces=9, **PARTS)
    assert pq.ParquetFile(whole).num_row_groups == 4
    real, seen = module._embedded, []

    def stops(group, *given):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append([document.name for document in group])
        return real(group, *given)

    monkeypatch.setattr(module, "_embedded", stops)
    with pytest.raises(KeyboardInterrupt):
        embed(model, texts, output, pieces=9, **PARTS)
    assert not output.exists()
    assert "6 documents are kept in" in caplog.text
    monkeypatch.setattr(
        module, "_embedded", lambda group, *given: seen.append([d.name for d in group]) or real(group, *given)
    )
    embed(model, texts, output, pieces=9, **PARTS)
    names = [name for group in seen for name in group]
    assert names == [str(file) for file in sorted(texts.iterdir())]  # each once
    assert output.read_bytes() == whole.read_bytes()
    assert set(tmp_path.iterdir()) == {whole, output}
    embed(model, texts, output, pieces=9, **PARTS)  # there already
    assert len(seen) == 4


def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(model, texts, tmp_path):
    whole, output = tmp_path / "whole.parquet", tmp_path / "v.parquet"
    command = ["embed", str(model), str(texts), "--batch-tokens", "8", "--output"]
    notes, killed = [], 0
    fork = multiprocessing.get_context("fork")

    def attempt(target, change):
        process = fork.Process(target=victim, args=([*command, str(target)], change, None, tmp_path / "note", tmp_path))
        process.start()
        process.join(HANG)
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "note.log").read_text()
        notes.append((tmp_path / "note").read_text())
        return process.exitcode

    assert attempt(whole, None) == 0
    changes = int(notes[0].split()[1])
    for change in range(1, changes + 1, 2):
        while attempt(output, change) and killed < 99:  # each attempt gets further, or else ends here
            killed += 1
            if change < 4:  # so early that each is killed at the same place
                break
        if not output.exists():
            assert attempt(output, None) == 0
        assert output.read_bytes() == whole.read_bytes()
        assert not output.with_name("v.parquet.parts").exists() or attempt(output, None) == 0
        output.unlink()
    assert killed > changes / 2
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "note", "note.log"}


@pytest.fixture
def half(model, texts, tmp_path, monkeypatch):
    """Output of a run that has finished half of the documents."""
    real, seen = module._embedded, []

    def stops(*given):
        seen.append(given)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_embedded", stops)
        with pytest.raises(KeyboardInterrupt):
            embed(model, texts, tmp_path / "v.parquet", **PARTS)
    return tmp_path / "v.parquet"


def test_another_run_does_not_go_on_with_it(half, folder, model, texts, tmp_path):
    parts = half.with_name("v.parquet.parts")
    before = tree(parts)
    other = tmp_path / "other"
    shutil.copytree(texts, other)
    (other / "11.txt").write_text("changed", encoding="utf-8")
    for given, options, different in (
        ((folder(pooling="max"), texts), {}, "model"),
        ((model, other), {}, "inputs"),
        ((model, texts), {"pieces": 4}, "pieces"),
        ((model, texts), {"max_length": 20}, "model, max_length"),
    ):
        with pytest.raises(ValueError, match=rf"beginning of another run: {different} differ\. Give the command that"):
            embed(*given, half, **PARTS, **options)
    assert tree(parts) == before
    embed(model, texts, half, **PARTS)
    for given, options in (((model, other), {}), ((model, texts), {"pieces": 4})):
        with pytest.raises(FileExistsError, match="made from something else: name another --output, or delete it"):
            embed(*given, half, **PARTS, **options)


@pytest.mark.parametrize("place", [200, -100])
def test_a_damaged_part_is_made_again(half, model, texts, tmp_path, place, caplog):
    whole = tmp_path / "whole.parquet"
    embed(model, texts, whole, **PARTS)
    part = half.with_name("v.parquet.parts") / "000001.parquet"
    content = bytearray(part.read_bytes())
    content[place] ^= 1
    part.write_bytes(content)
    embed(model, texts, half, **PARTS)
    assert "000001.parquet is damaged: it, and what follows, is made again." in caplog.text
    assert half.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pieces", "0"], "--pieces is a number of tokens, at least 1, not 0."),
        (["--batch-tokens", "-1"], "--batch-tokens is a number of tokens, at least 1, not -1."),
        (["--pieces", "4", "--sentences"], "--pieces and --sentences exclude each other: choose one of them"),
        (["--sentences", "--spans", "where"], "--sentences and --spans exclude each other"),
        (["--max-length", "4096"], "max_length=4096 is more than the 48 positions of the model: choose at most 48"),
        (["--column", "text"], "has no column 'text'; its columns are body, where. Set --column."),
        (["--spans", "none"], "has no column 'none'; its columns are body, where. Set --column, --spans."),
        (["--prompt-name", "none"], "has no prompt 'none'; it has query, document."),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, rows, tmp_path, capsys, options, message):
    column = [] if "--column" in options else ["--column", "body"]
    output = tmp_path / "v.parquet"
    assert message in error_line(capsys, "embed", str(model), str(rows), "--output", str(output), *column, *options)
    assert list(tmp_path.iterdir()) == [rows]


def test_vectors_among_the_documents_are_none_of_them(model, tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the old river")
    (texts / "b.txt").write_text("a stone")
    output = texts / "vectors.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(model, texts, output)
    assert (texts / "vectors.parquet.parts").is_dir()
    first = embed(model, [texts, texts / "a.txt", texts / "*.txt"], output)
    assert [row["document"] for row in first] == [str(texts / name) for name in ("a.txt", "b.txt")]
    assert embed(model, texts, output) == first


def test_outputs_and_folders_that_cannot_be_used(model, folder, rows, texts, tmp_path, capsys):
    def line(*given):
        return error_line(capsys, "embed", *map(str, given), "--column", "body")

    assert "is a folder; name a file, such as" in line(model, rows, "--output", tmp_path)
    (tmp_path / "v.parquet").write_text("mine")
    assert "was not made here: name another --output" in line(model, rows, "--output", tmp_path / "v.parquet")
    assert (tmp_path / "v.parquet").read_text() == "mine"
    assert "no files at" in line(model, tmp_path / "none.txt", "--output", tmp_path / "w.parquet")
    assert "cannot be loaded" in line(texts, rows, "--output", tmp_path / "w.parquet")
    assert "there is no folder" in line(tmp_path / "none", rows, "--output", tmp_path / "w.parquet")
    cls = folder(pooling="cls")
    assert "the folder's pooling is 'cls'" in line(cls, rows, "--output", tmp_path / "w.parquet", "--sentences")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "v.parquet"}


def test_an_error_before_anything_is_finished_leaves_nothing(model, rows, tmp_path, monkeypatch):
    def fails(*given):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_write", fails)
    with pytest.raises(OSError, match="No space"):
        embed(model, rows, tmp_path / "v.parquet", column="body")
    assert list(tmp_path.iterdir()) == [rows]
