"""`linformer-hf VERB ...`: one verb, one function, imported when it is called.

What a module's `told(result)` says, if it has one, is shown: Markdown, and a last line.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import shlex
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from .utils.options import (
    App,
    Argument,
    Convert,
    Demo,
    Embed,
    Export,
    Option,
    Push,
    RecipeRun,
    Reproduce,
    Training,
    marks,
)
from .utils.processes import check_count, end, end_with_parent, leave_group, sigterm_raises


class Verb(NamedTuple):
    """One line of the table: the function `verb` of a module, what it takes, and what it is for."""

    module: str
    options: type
    help: str
    more: str = ""  # behind `help` in the verb's own --help


VERBS = {
    "pretrain": Verb("training.pretrain", Training, "pretrain a Linformer as a masked language model"),
    "finetune": Verb(
        "training.finetune", Training, "fine-tune a checkpoint on labelled texts, words, questions or pairs"
    ),
    "distill": Verb("training.distill", Training, "train a converted model to give what its source gives"),
    "benchmark": Verb(
        "benchmark.benchmark", RecipeRun, "time and memory beside every alternative, the paper's Table 3 and Figure 2"
    ),
    "spectrum": Verb(
        "paper.spectrum",
        RecipeRun,
        "how far from low rank a model's attention maps are (the paper's Figure 1), and which K they need",
    ),
    "sweep": Verb(
        "paper.sweep",
        RecipeRun,
        "pretrain one recipe many times, changed along K, sharing, N, ... (the paper's Figure 3)",
    ),
    "theory": Verb(
        "paper.theory", RecipeRun, "the paper's two theorems, measured on attention maps beside their bounds"
    ),
    "compare": Verb(
        "paper.compare",
        RecipeRun,
        "fine-tune several checkpoints alike, on several tasks with several seeds, into one table",
    ),
    "evaluate": Verb(
        "evaluation.evaluate",
        RecipeRun,
        "embed long documents by converted encoders and by the source's pieces, and search and classify with them",
        ". What was read is kept: the same command goes on.",
    ),
    "demo": Verb(
        "demo.demo",
        Demo,
        "pretrain and fine-tune a small Linformer on real text, and report what it learned (minutes on 2 cores)",
    ),
    "reproduce": Verb(
        "paper.reproduce",
        Reproduce,
        "the paper's figures and tables, run or reused, on one page with a verdict on every claim",
        ".",
    ),
    "convert": Verb(
        "conversion.convert",
        Convert,
        "make a pretrained BERT or RoBERTa a Linformer, in minutes, and report how faithful it is",
        ".",
    ),
    "embed": Verb(
        "embedding.embed",
        Embed,
        "write the vectors of documents, or of their pieces, sentences or spans from one pass over each",
        " (pip install 'linformer_hf[ecosystem]'). A stopped run goes on when the same command is given again.",
    ),
    "export": Verb(
        "hub.export",
        Export,
        "write a checkpoint as an ONNX file and check it under onnxruntime (pip install 'linformer_hf[onnx]')",
        ".",
    ),
    "push": Verb("hub.push", Push, "check a finished model's folder and upload it to the Hub", ", in one commit."),
    "app": Verb(
        "app.app",
        App,
        "a page in the browser to try a model on texts of your own (pip install 'linformer_hf[app]')",
        ". It listens on this machine only; Ctrl-C ends it.",
    ),
}
RECIPE_VERBS = [verb for verb, facts in VERBS.items() if issubclass(facts.options, RecipeRun)]
RESUMABLE = [verb for verb in RECIPE_VERBS if VERBS[verb].options is Training]
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
    for verb, (_, options, text, more) in VERBS.items():
        command = verbs.add_parser(verb, help=text, description=text + more)
        if verb in RECIPE_VERBS:
            command.epilog, command.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
        for name, (kind, default, mark) in marks(options).items():
            _add(command, name, kind, default, mark)
        command.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
        told = command.add_mutually_exclusive_group()
        told.add_argument(
            "--quiet", action="store_true", help="print where the results are, and errors, but no progress"
        )
        told.add_argument(
            "--json", action="store_true", help="print the results as one line of JSON, all else to stderr"
        )
    return parser


def _add(command: argparse.ArgumentParser, name: str, kind: Any, default: Any, mark: Argument | Option) -> None:
    """An argument of the parser, from a field of a verb's options."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    given: dict[str, Any] = {"help": mark.help}
    if isinstance(mark, Argument):
        several = any(get_origin(one) is Sequence for one in kinds)
        given |= {"metavar": mark.metavar} | ({"nargs": "+" if default is MISSING else "*"} if several else {})
        command.add_argument(name, **given)
        return
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag, given["action"] = (flag.replace("--", "--no-"), "store_false") if default else (flag, "store_true")
    elif choices := [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]:
        given["choices"] = choices
    else:
        given |= {"type": _lengths if list[int] in kinds else int if int in kinds else str, "metavar": mark.metavar}
    command.add_argument(flag, dest=name, required=default is MISSING, default=default, **given)


def _lengths(text: str) -> int | list[int]:
    """`128`, or `256,128,64`: one K for each layer."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor numbers with commas between them") from None
    return numbers[0] if len(numbers) == 1 else numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb: what `linformer-hf`, `python -m linformer_hf` and scripts/ begin and, in each process, end with.

    Args:
        arguments: by default this program's own. Then, if all has gone well, one of several processes that share a run
            leaves the others and ends here.

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
    # httpx2 is what huggingface_hub 2 uses.
    for noisy in ("httpx", "httpx2", "datasets", "matplotlib", "sentence_transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with sigterm_raises(), _told(options):
            place = _run(options)
        _tell(options, place)
        if arguments is None and leave_group():
            end()
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
    """Call the verb with what was given, and leave the rest to its defaults; what it returns: where its results are."""
    module, taken, *_ = VERBS[options.verb]
    given = {name: value for name in marks(taken) if (value := getattr(options, name)) is not None}
    check_count(given.pop("expect_processes", None), options.verb)
    found = importlib.import_module(f".{module}", __package__)
    verb = getattr(found, options.verb)
    if options.verb in RECIPE_VERBS:
        return verb(given.pop("recipe"), given.pop("overrides"), **given)
    made = verb(**given)
    if hasattr(found, "told"):
        from .utils.runs import show  # here: --help needs none of it

        text, line = found.told(made)
        if text:
            show(f"\n{text}\n")
        print(line)
    return made


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
