"""`linformer-hf app FOLDER`: a page in the browser to try a model on texts of one's own (extra `app`: Gradio).

It listens on this machine only, sends nothing and fetches nothing.
"""

import importlib.util
import json
import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..conversion.huggingface import read_source
from ..hub.export import load
from ..modeling_linformer import LinformerForMaskedLM, LinformerForSequenceClassification
from ..utils.files import RESULTS_FILE, loading
from ..utils.options import App, takes
from ..utils.reporting import format_number, markdown_table
from . import views as app_views
from .views import Subject


logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
EXAMPLE = "The doctor prescribed a new {} for the patient, who had been ill for a week."


@takes(App)
def app(options: App) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: Gradio is not installed, the folder holds no Linformer, or the port is taken.
        OSError: the folder cannot be read.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'linformer_hf[app]'.")
    if options.port is not None:
        _check_port(options.port)
    blocks = page(read(options.folder, options.source), str(options.folder))
    served = {"server_name": HOST, "server_port": options.port, "inbrowser": options.show, "share": False}
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **served, **look())
    print(f"The page: {address}  (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


def read(folder: str | os.PathLike, source: str | None = None) -> Subject:
    """The model of a folder, with its source where that is known. Raises as `app` does."""
    model = load(folder)
    model.set_attn_implementation("sdpa")
    with loading(str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    source = source or _noted_source(Path(folder))
    return Subject(model, tokenizer, None if source is None else read_source(source))


def _noted_source(folder: Path) -> str | None:
    """What `convert` noted, if it is a folder that is still there: a Hub name would be downloaded unasked."""
    if not (folder / RESULTS_FILE).exists():
        return None
    noted = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")).get("source")
    place = Path(noted).expanduser() if isinstance(noted, str) else None
    return str(place) if place is not None and place.is_dir() else None


def _check_port(port: int) -> None:
    with socket.socket() as tried:
        try:
            tried.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"port {port} cannot be used ({error}): choose another by --port, or leave it out."
            ) from None


def look() -> dict[str, Any]:
    """Options of the page's `launch`: fonts of the system, since others would be fetched."""
    import gradio

    font = ["system-ui", "sans-serif"]
    return {"theme": gradio.themes.Soft(font=font, font_mono=["ui-monospace", "monospace"]), "footer_links": []}


def page(subject: Subject, name: str) -> Any:
    """The page as gradio.Blocks, with the tabs that the model's head can fill."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at import
    import gradio

    with gradio.Blocks(title=f"linformer_hf: {name}", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {name}\n\n{describe(subject)}")
        word = subject.tokenizer.mask_token if isinstance(subject.model, LinformerForMaskedLM) else "medicine"
        text = gradio.Textbox(EXAMPLE.format(word), label="Text", lines=6, max_lines=14, elem_id="text")
        if isinstance(subject.model, LinformerForMaskedLM):
            _fill_mask_tab(subject, text)
        if isinstance(subject.model, LinformerForSequenceClassification):
            _classify_tab(subject, text)
        _attention_tab(subject, text)
        if subject.source is not None:
            _plot_tab("Spectrum", "Decompose", partial(app_views.spectrum, subject), text)
        _plot_tab("Speed", "Measure", partial(_timed, subject), text)
    return blocks


def describe(subject: Subject) -> str:
    config = subject.model.config
    k = config.projected_length if isinstance(config.projected_length, int) else tuple(config.projected_length)
    source = f"source: `{subject.source.name}`" if subject.source else "source not known (`--source`)"
    return (
        f"{type(subject.model).__name__}, {subject.model.num_parameters() / 1e6:.1f} M parameters, "
        f"N = {subject.length:,}, K = {k}, `{config.projection_type}`; {source}"
    )


def _said(call: Callable[..., Any]) -> Callable[..., Any]:
    """What is wrong with a text as a message on the page."""
    import gradio

    def told(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return told


def _fill_mask_tab(subject: Subject, text: Any) -> None:
    import gradio

    def fill(given: str) -> list[list[Any]]:
        return [[n, word, f"{chance:.3f}"] for n, word, chance in app_views.fill_mask(subject, given)]

    with gradio.Tab("Fill masks"):
        button = gradio.Button("Fill", variant="primary", elem_id="fill")
        table = gradio.Dataframe(headers=["mask", "word", "probability"], interactive=False, elem_id="filled")
        button.click(_said(fill), text, table)


def _classify_tab(subject: Subject, text: Any) -> None:
    import gradio

    def classify(given: str) -> tuple[Any, str]:
        chances, note = app_views.classify(subject, given)
        if len(chances) == 1:  # a regression
            return {}, f"{next(iter(chances.values())):.4g}. {note}"
        return chances, note

    with gradio.Tab("Classify"):
        button = gradio.Button("Classify", variant="primary", elem_id="classify")
        label = gradio.Label(label="classes", elem_id="classes")
        note = gradio.Markdown(elem_id="read")
        button.click(_said(classify), text, [label, note])


def _attention_tab(subject: Subject, text: Any) -> None:
    import gradio

    config = subject.model.config
    with gradio.Tab("Attention"):
        with gradio.Row():
            layer = gradio.Slider(0, max(1, config.num_hidden_layers - 1), 0, step=1, label="layer")
            head = gradio.Slider(0, max(1, config.num_attention_heads - 1), 0, step=1, label="head")
        button = gradio.Button("Draw", variant="primary", elem_id="draw")
        plot = gradio.Plot(show_label=False, elem_id="attention")
        note = gradio.Markdown()
        button.click(_said(partial(app_views.attention, subject)), [text, layer, head], [plot, note])


def _timed(subject: Subject, text: str) -> tuple[Any, str]:
    figure, rows = app_views.speed(subject, text)
    header = ("tokens", "this Linformer, ms", "source, ms")
    cells = [(n, ours, "" if theirs is None else format_number(theirs)) for n, ours, theirs in rows]
    return figure, markdown_table(header, cells)


def _plot_tab(title: str, action: str, call: Callable[..., Any], text: Any) -> None:
    import gradio

    with gradio.Tab(title):
        button = gradio.Button(action, variant="primary", elem_id=action.lower())
        plot = gradio.Plot(show_label=False, elem_id=f"{title.lower()}-plot")
        note = gradio.Markdown(elem_id=f"{title.lower()}-note")
        button.click(_said(call), text, [plot, note])
