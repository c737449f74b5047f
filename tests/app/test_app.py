"""The page of `linformer-hf app`: what it shows, and the page itself in headless Chromium."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import add_noise, tiny_model
from transformers import pipeline

from linformer_hf import LinformerForMaskedLM, LinformerForSequenceClassification, cli
from linformer_hf.app import views as app_views
from linformer_hf.app.app import read
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from waiting import HANG


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The command, in a process that ends with status 99 where it turns to any machine but this one.
SERVE = """
import os, sys
def loopback_only(event, given):
    host = given[0] if event == "socket.getaddrinfo" else given[1] if event == "socket.connect" else None
    host = host[0] if isinstance(host, tuple) else host
    if host not in (None, "", "127.0.0.1", "localhost", b"127.0.0.1", b"localhost"):
        os.write(2, f"NETWORK: {event} {given}\\n".encode())
        os._exit(99)
sys.addaudithook(loopback_only)
from linformer_hf import cli
sys.exit(cli.main(sys.argv[1:]))
"""
TEXT = "A river runs past the mountain. " * 12


def saved(folder: Path, model, tokenizer, **results) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if results:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tiny_source, tokenizers, tmp_path_factory):
    place, tokenizer = tmp_path_factory.mktemp("app"), tokenizers["wordpiece"]
    source = tiny_source(max_position_embeddings=128)
    converted = convert_model(read_source(str(source)), projected_length=16, length_correction=True)
    add_noise(converted)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "projected_length": 32}
    names = {"id2label": {0: "calm", 1: "wild"}, "label2id": {"calm": 0, "wild": 1}}
    return {
        "masks": saved(place / "masks", tiny_model(LinformerForMaskedLM, **sizes), tokenizer),
        "classes": saved(
            place / "classes", tiny_model(LinformerForSequenceClassification, **sizes, **names), tokenizer
        ),
        "converted": saved(place / "converted", converted, tokenizer, source=str(source)),
    }


def test_words_are_those_of_the_pipeline(folders):
    subject = read(folders["masks"])
    text = "A [MASK] runs past the [MASK]."
    found = app_views.fill_mask(subject, text)
    expected = pipeline("fill-mask", model=subject.model, tokenizer=subject.tokenizer, top_k=app_views.BEST)(text)
    assert [(number, word) for number, word, _ in found] == [
        (number, row["token_str"].strip()) for number, rows in enumerate(expected, 1) for row in rows
    ]
    torch.testing.assert_close([row[2] for row in found], [row["score"] for rows in expected for row in rows])


def test_classes_and_what_was_read(folders):
    subject = read(folders["classes"])
    chances, note = app_views.classify(subject, "A river.")
    assert list(chances) == ["calm", "wild"]
    assert sum(chances.values()) == pytest.approx(1)
    assert note.startswith("All ")
    whole = len(subject.tokenizer(TEXT * 3)["input_ids"])
    chances, note = app_views.classify(subject, TEXT * 3)
    assert note == f"The first 128 of {whole:,} tokens were read: N = 128."
    expected = pipeline("text-classification", model=subject.model, tokenizer=subject.tokenizer, top_k=None)
    assert chances == pytest.approx(
        {row["label"]: row["score"] for row in expected([TEXT * 3], truncation=True, max_length=128)[0]}
    )


def test_attention_is_the_models(folders):
    subject = read(folders["converted"])
    figure, note = app_views.attention(subject, TEXT, 1, 1)
    image = torch.as_tensor(figure.axes[0].images[0].get_array()) ** 2
    inputs, _ = subject.encode(TEXT)
    n = inputs["input_ids"].shape[1]
    assert image.shape == (min(n, app_views.SHOWN_TOKENS), 16)
    torch.testing.assert_close(image.sum(1), torch.ones(len(image)))
    shown = f"the first 64 of {n}"
    assert note == (
        f"Rows: {shown} tokens. Columns: 4 slots that stand for all {n} tokens, "
        "and 12 single tokens around that of the row."
    )
    _, note = app_views.attention(subject, "A river.", 0, 0)
    assert re.fullmatch(r"Rows: (\d+) tokens. Columns: \1 slots that stand for all \1 tokens.", note)
    assert subject.model.config._attn_implementation == "sdpa"


def test_spectrum_is_the_sources(folders):
    figure, note = app_views.spectrum(read(folders["converted"]), TEXT)
    curves = [line.get_ydata() for line in figure.axes[0].lines[:-1]]
    assert len(curves) == 2
    for curve in curves:
        assert curve[-1] == pytest.approx(1, abs=1e-4)
        assert (curve[1:] >= curve[:-1] - 1e-6).all()
    assert "A quarter of the singular values hold" in note


def test_speed_of_both(folders):
    _, rows = app_views.speed(read(folders["converted"]), "A river.")
    assert [n for n, *_ in rows] == [64, 128]
    assert all(ours > 0 and theirs > 0 for _, ours, theirs in rows)
    _, rows = app_views.speed(read(folders["masks"]), "A river.")
    assert all(theirs is None for *_, theirs in rows)


@pytest.mark.parametrize(
    ("view", "text", "message"),
    [
        (app_views.fill_mask, " \n", "There is no text"),
        (app_views.fill_mask, "A river.", r"There is no \[MASK\] in the text: put one"),
        (app_views.fill_mask, TEXT * 3 + "[MASK]", r"no \[MASK\] in the text among the tokens that were read"),
        (app_views.spectrum, TEXT, "start the page with --source"),
        (lambda subject, text: app_views.attention(subject, text, 9, 0), "A river.", "There are layers 0 to 1"),
    ],
)
def test_texts_that_cannot_be_used(folders, view, text, message):
    with pytest.raises(ValueError, match=message):
        view(read(folders["masks"]), text)


def test_a_short_text_has_no_spectrum(folders):
    with pytest.raises(ValueError, match="a spectrum needs at least 64"):
        app_views.spectrum(read(folders["converted"]), "A river.")


def test_a_source_is_taken_from_its_folder_only(folders, tmp_path):
    shutil.copytree(folders["converted"], tmp_path / "moved")
    assert read(tmp_path / "moved").source is not None
    (tmp_path / "moved" / "results.json").write_text(json.dumps({"source": "someone/else"}), encoding="utf-8")
    assert read(tmp_path / "moved").source is None  # a Hub name: nothing is downloaded unasked


def test_bad_calls_are_one_line(folders, tmp_path, capsys):
    assert cli.main(["app", str(tmp_path)]) == 2
    assert "is not the folder of a saved model" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["app", str(folders["masks"]), "--port", str(port)]) == 2
    assert f"error: port {port} cannot be used" in capsys.readouterr().err


def test_without_gradio_the_command_is_named(folders, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert cli.main(["app", str(folders["masks"])]) == 2
    assert "pip install 'linformer_hf[app]'" in capsys.readouterr().err


@pytest.fixture
def served(folders, request):
    """The address of a page, run by the command, and its folder."""
    folder, said = folders[request.param], "cannot be used"
    while "cannot be used" in said:  # another process has taken the port meanwhile
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-P", "-c", SERVE, "app", str(folder), "--port", str(port)]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = ""
        while "The page:" not in said and (line := run.stdout.readline()):
            said += line
    with run:
        yield f"http://127.0.0.1:{port}", run, folder
        run.kill()
    assert f"The page: http://127.0.0.1:{port}/" in said, said


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize(
    ("served", "tab", "button", "shown"),
    [("masks", "Fill masks", "#fill", "#filled"), ("classes", "Classify", "#classify", "#classes")],
    indirect=["served"],
)
def test_the_page_in_a_browser(served, tab, button, shown):
    from playwright.sync_api import expect, sync_playwright

    address, run, folder = served
    text = "A [MASK] runs past the mountain."
    words = "wild" if shown == "#classes" else f"{app_views.fill_mask(read(folder), text)[0][2]:.3f}"
    with sync_playwright() as playwright:
        # --no-sandbox: Chromium refuses to run as root with it, and the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=HANG * 1000)
        page = browser.new_page()
        page.set_default_timeout(HANG * 1000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#text textarea").fill(text)
        page.get_by_role("tab", name=tab).click()
        page.locator(button).click()
        expect(page.locator(shown)).to_contain_text(words, timeout=HANG * 1000)
        page.get_by_role("tab", name="Attention").click()
        page.locator("#draw").click()
        expect(page.locator("#attention img")).to_be_visible(timeout=HANG * 1000)
        page.locator("#text textarea").fill("")
        page.locator("#draw").click()
        expect(page.get_by_text("There is no text: type or paste one.")).to_be_visible(timeout=HANG * 1000)
        browser.close()
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
    run.send_signal(2)
    assert run.wait(HANG) in (0, 130)
