"""`linformer-hf VERB ...`: one verb, one function, imported when it is called."""

import argparse
import contextlib
import importlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .conversion.key_tables import FAMILIES
from .utils.processes import end_with_parent, sigterm_raises


RECIPE_VERBS = {
    "pretrain": "pretrain a Linformer as a masked language model",
    "finetune": "fine-tune a checkpoint on a classification or regression task",
    "distill": "train a converted model to give what its source gives",
    "benchmark": "time and memory beside every alternative, the paper's Table 3 and Figure 2",
    "spectrum": "how far from low rank a model's attention maps are (the paper's Figure 1), and which K they need",
    "sweep": "pretrain one recipe many times, changed along K, sharing, N, ... (the paper's Figure 3)",
    "theory": "the paper's two theorems, measured on attention maps beside their bounds",
    "compare": "fine-tune several checkpoints alike, on several tasks with several seeds, into one table",
}
MODULES = {
    **{verb: f"training.{verb}" for verb in ("pretrain", "finetune", "distill")},
    **{verb: f"paper.{verb}" for verb in ("spectrum", "theory", "sweep", "compare", "reproduce")},
    **{verb: f"hub.{verb}" for verb in ("push", "export")},
    "convert": "conversion.convert",
    "benchmark": "benchmark.benchmark",
    "demo": "demo.demo",
    "app": "app.app",
}
SCALES = ("quick", "cpu", "paper")
EVERYWHERE = ("verb", "traceback", "quiet", "json")  # options that no verb sees
RESUMABLE = ("pretrain", "finetune", "distill")  # the others keep what is finished, or take minutes
EPILOG = """\
A recipe is one YAML file = one run; section.key=value changes it for this run, for example
  linformer-hf pretrain configs/pretrain/tiny-cpu.yaml data.sources.0.path=texts training.output_dir=runs/mine
Every run leaves a folder that from_pretrained loads, with results.json, curve.png and a model card in it.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="linformer-hf",
        description="Linformers for Hugging Face Transformers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in RECIPE_VERBS.items():
        command = verbs.add_parser(
            verb, help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("recipe", metavar="RECIPE.yaml")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        if verb in RESUMABLE:
            text = "go on from the last whole checkpoint in output_dir"
            command.add_argument("--resume", action="store_true", help=text)
    text = "pretrain and fine-tune a small Linformer on real text, and report what it learned (minutes on 2 cores)"
    command = verbs.add_parser("demo", help=text, description=text)
    command.add_argument("--output", default="runs/demo", metavar="FOLDER", help="default: %(default)s")
    command.add_argument("--force", action="store_true", help="delete an earlier demo in that folder first")
    text = "the paper's figures and tables, run or reused, on one page with a verdict on every claim"
    command = verbs.add_parser("reproduce", help=text, description=text + ".")
    command.add_argument("--scale", required=True, choices=SCALES, help="which configs/reproduce/SCALE.yaml")
    command.add_argument("--no-run", action="store_true", help="run nothing: report what is there")
    command.add_argument("overrides", nargs="*", metavar="reproduce.key=value")
    _add_convert(verbs)
    text = "write a checkpoint as an ONNX file and check it under onnxruntime (pip install 'linformer_hf[onnx]')"
    command = verbs.add_parser("export", help=text, description=text + ".")
    command.add_argument("folder", metavar="FOLDER", help="a saved model, as a run or `convert` leaves it")
    command.add_argument("--format", default="onnx", metavar="FORMAT", help="onnx (default: %(default)s)")
    command.add_argument("--output", metavar="FILE", help="default: FOLDER/model.onnx")
    command.add_argument("--opset", type=int, metavar="N", help="ONNX opset, 18 or later; default: the exporter's")
    _add_push(verbs)
    _add_app(verbs)
    for command in verbs.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
        told = command.add_mutually_exclusive_group()
        told.add_argument(
            "--quiet", action="store_true", help="print where the results are, and errors, but no progress"
        )
        told.add_argument(
            "--json", action="store_true", help="print the results as one line of JSON, all else to stderr"
        )
    return parser


def _add_convert(verbs: Any) -> None:
    *others, last = FAMILIES
    text = "make a pretrained BERT or RoBERTa a Linformer, in minutes, and report how faithful it is"
    command = verbs.add_parser("convert", help=text, description=text + ".")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help=f"Hub name or folder of a {', '.join(others)} or {last} model, or the .pt file of an official fairseq "
        "Linformer",
    )
    command.add_argument("output", metavar="OUTPUT", help="folder to write; it must not exist or be empty")
    command.add_argument(
        "--projected-length",
        type=_lengths,
        metavar="K",
        help="keys of each query, one number or one for each layer (256,256,128,...); default: 128",
    )
    command.add_argument("--max-length", type=int, metavar="N", help="longest input in tokens; default: the source's")
    command.add_argument(
        "--positions",
        choices=("repeat", "interpolate"),
        default="repeat",
        help="how positions are extended beyond the source's (default: %(default)s)",
    )
    command.add_argument(
        "--projection-type",
        choices=("gated_pool", "mean_pool", "max_pool", "linear", "fixed", "conv"),
        help="default: gated_pool",
    )
    command.add_argument("--projection-sharing", choices=("none", "headwise", "key_value", "layerwise"))
    command.add_argument(
        "--local-window",
        type=int,
        metavar="W",
        help="gated_pool: 3 W of the K keys are the single tokens around the query; default: K / 4",
    )
    command.add_argument(
        "--calibrate",
        metavar="CORPUS",
        help="text to calibrate on: a file, a folder or a glob; hub:NAME; or demo, the text of installed packages",
    )
    command.add_argument("--calibration-rows", type=int, metavar="ROWS", help="default: 131,072 tokens' worth")
    command.add_argument("--tokenizer", metavar="NAME", help="another tokenizer than the source's own")
    command.add_argument("--revision", help="commit, branch or tag of a Hub repository")
    command.add_argument("--seed", type=int, default=0, help="of the text that is drawn (default: %(default)s)")


def _add_push(verbs: Any) -> None:
    text = "check a finished model's folder and upload it to the Hub"
    command = verbs.add_parser("push", help=text, description=text + ", in one commit.")
    command.add_argument(
        "folder", metavar="FOLDER", help="what a run or save_pretrained left: weights, tokenizer, card"
    )
    command.add_argument("repository", metavar="USER/NAME", help="created if it is not there")
    command.add_argument("--private", action="store_true", help="create it as a private repository")
    command.add_argument("--revision", metavar="R", help="a branch, created if it is not there; default: main")
    command.add_argument("--dry-run", action="store_true", help="check and list the files, send nothing")


def _add_app(verbs: Any) -> None:
    text = "a page in the browser to try a model on texts of your own (pip install 'linformer_hf[app]')"
    command = verbs.add_parser(
        "app", help=text, description=text + ". It listens on this machine only; Ctrl-C ends it."
    )
    command.add_argument("folder", metavar="FOLDER", help="a saved model, as a run or `convert` leaves it")
    text = "what it was converted from, to compare with; default: what the conversion noted, if that is a folder"
    command.add_argument("--source", metavar="SOURCE", help=text)
    command.add_argument("--port", type=int, metavar="PORT", help="default: the first free one from 7860 on")
    command.add_argument("--show", action="store_true", help="open a browser")


def _lengths(text: str) -> int | list[int]:
    """`128`, or `256,128,64`: one K for each layer."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor numbers with commas between them") from None
    return numbers[0] if len(numbers) == 1 else numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit status: 0; 2 with one line `error: ...` for what the user can put right; 130 after Ctrl-C and 143 after
        SIGTERM, with one line that says how to go on.
    """
    end_with_parent()
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if not argument.startswith("-")]  # those behind an option
    if options.verb not in (*RECIPE_VERBS, "reproduce") or len(overrides) < len(rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.overrides += overrides
    logging.basicConfig(level=logging.WARNING if options.quiet else logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2", "datasets", "matplotlib"):  # httpx2 is what huggingface_hub 2 uses
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with sigterm_raises(), _told(options):
            place = _run(options)
        _tell(options, place)
    except KeyboardInterrupt as interruption:
        number = getattr(interruption, "number", signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":
            again = _again(sys.argv[1:] if arguments is None else arguments)
            print(_last_words(number, getattr(interruption, "checkpoint", None), options.verb, again), file=sys.stderr)
        return 128 + number
    except (
        ValueError,
        OSError,
        FloatingPointError,
        ImportError,
    ) as error:  # ImportError: flash attention, not installed
        if options.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _told(options: argparse.Namespace) -> Iterator[None]:
    """Send what is printed meanwhile, also by child processes, to stderr (--json) or nowhere (--quiet)."""
    if not (options.quiet or options.json):
        yield
        return
    before = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as python:
        sys.stdout.flush()
        if options.quiet:  # progress bars write to stderr; errors are printed after this
            os.dup2(nowhere.fileno(), 2)
            python.enter_context(contextlib.redirect_stderr(nowhere))
        os.dup2(2, 1)
        python.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            sys.stdout.flush()
            for number, copy in before.items():
                os.dup2(copy, number)
                os.close(copy)


def _tell(options: argparse.Namespace, place: Any) -> None:
    """The one line of --quiet and --json."""
    if options.quiet and place is not None:
        print(place)
    elif options.json:
        results = Path(str(place)) / "results.json"
        found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"path": str(place)}
        print(json.dumps(found))


def _run(options: argparse.Namespace) -> Any:
    """Call the verb; what it returns: where its results are."""
    verb = getattr(importlib.import_module(f".{MODULES[options.verb]}", __package__), options.verb)
    if options.verb == "demo":
        return verb(options.output, force=options.force)
    if options.verb == "reproduce":
        return verb(options.scale, options.overrides, run=not options.no_run)
    if options.verb in ("convert", "export", "push", "app"):
        given = {key: value for key, value in vars(options).items() if value is not None}
        return verb(**{key: value for key, value in given.items() if key not in EVERYWHERE})
    given = {"resume": options.resume} if options.verb in RESUMABLE else {}
    return verb(options.recipe, options.overrides, **given)


def _again(arguments: Sequence[str]) -> str:
    """The command that goes on with an interrupted run."""
    arguments = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":  # started by a launcher, whose options are not known here
        return f"the same {processes} processes and {shlex.join(arguments)}"
    return f"linformer-hf {shlex.join(arguments)}"


def _last_words(number: int, checkpoint: Any, verb: str, again: str) -> str:
    name = signal.Signals(number).name
    if checkpoint is None or verb not in RESUMABLE:
        return f"stopped by {name}"
    return f"stopped by {name}; {checkpoint} is whole. Go on with: {again}"
