"""`linformer-hf VERB ...`: one verb, one function, imported when it is called."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn


RECIPE_VERBS = {
    "pretrain": "pretrain a Linformer as a masked language model",
    "finetune": "fine-tune a checkpoint on a classification or regression task",
}
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
        command.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in output_dir")
    text = "pretrain and fine-tune a small Linformer on real text, and report what it learned (minutes on 2 cores)"
    command = verbs.add_parser("demo", help=text, description=text)
    command.add_argument("--output", default="runs/demo", metavar="FOLDER", help="default: %(default)s")
    command.add_argument("--force", action="store_true", help="delete an earlier demo in that folder first")
    for command in verbs.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status is 0, or 2 with one line `error: ...` for what the user can put right."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if not argument.startswith("-")]  # those behind an option
    if options.verb not in RECIPE_VERBS or len(overrides) < len(rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.overrides += overrides
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    verb = getattr(importlib.import_module(f".{options.verb}", __package__), options.verb)
    try:
        if options.verb == "demo":
            verb(options.output, force=options.force)
        else:
            verb(options.recipe, options.overrides, resume=options.resume)
    except (ValueError, OSError, ImportError) as error:  # ImportError: flash attention asked for, not installed
        if options.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
