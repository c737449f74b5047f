"""What each verb takes, once: name, type, default and help text of every option.

The command line's parser, the arguments of the Python function and what `convert` notes in results.json come from these
dataclasses. No verb is imported here, so that `--help` imports none.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar, get_type_hints


class Argument(NamedTuple):
    """What the command line knows by its place."""

    metavar: str
    help: str | None = None


class Option(NamedTuple):
    """What the command line knows by its name, `--the-fields-name` (`--no-...` for a truth value that is true).

    A field that is neither is for Python only.
    """

    help: str | None = None
    metavar: str | None = None


@dataclass
class RecipeRun:
    """Of a verb that does what a recipe says."""

    recipe: Annotated[str, Argument("RECIPE.yaml")]
    overrides: Annotated[Sequence[str], Argument("section.key=value")] = ()


@dataclass
class Training(RecipeRun):
    """Of a verb whose run can be gone on with and shared by processes; the others keep what is finished."""

    _: KW_ONLY
    resume: Annotated[bool, Option("go on from the last whole checkpoint in output_dir")] = False
    expect_processes: Annotated[int | None, Option("end unless a launcher started N processes", "N")] = None


@dataclass
class Demo:
    output: Annotated[str, Option("default: %(default)s", "FOLDER")] = "runs/demo"
    force: Annotated[bool, Option("delete an earlier demo in that folder first")] = False


@dataclass
class Reproduce:
    scale: Annotated[Literal["quick", "cpu", "paper"], Option("which configs/reproduce/SCALE.yaml")]
    overrides: Annotated[Sequence[str], Argument("reproduce.key=value")] = ()
    run: Annotated[bool, Option("run nothing: report what is there")] = True


@dataclass
class Convert:
    source: Annotated[
        str,
        Argument(
            "SOURCE",
            "Hub name or folder of a BERT, RoBERTa or one of their kin (docs/guides/convert.md lists them), or the .pt "
            "file of an official fairseq Linformer",
        ),
    ]
    output: Annotated[str | Path, Argument("OUTPUT", "folder to write; it must not exist or be empty")]
    _: KW_ONLY
    projected_length: Annotated[
        int | list[int] | None,
        Option(
            "keys of each query, one number or one for each layer (256,256,128,...); default: 128, or what the source "
            "reads where --max-length is more",
            "K",
        ),
    ] = None
    max_length: Annotated[int | None, Option("longest input in tokens; default: the source's", "N")] = None
    positions: Annotated[
        Literal["repeat", "interpolate"],
        Option("how positions are extended beyond the source's (default: %(default)s)"),
    ] = "repeat"
    projection_type: Annotated[
        Literal["gated_pool", "mean_pool", "max_pool", "linear", "fixed", "conv", "dense_conv"] | None,
        Option("default: gated_pool"),
    ] = None
    projection_sharing: Annotated[Literal["none", "headwise", "key_value", "layerwise"] | None, Option()] = None
    local_window: Annotated[
        int | None,
        Option("3 W of the K keys are the single tokens around the query; default: K / 4 for gated_pool, else 0", "W"),
    ] = None
    calibrate: Annotated[
        str | None,
        Option(
            "text to calibrate on: a file, a folder or a glob; hub:NAME; or demo, the text of installed packages",
            "CORPUS",
        ),
    ] = None
    calibration_rows: Annotated[int | None, Option("default: 131,072 tokens' worth", "ROWS")] = None
    tokenizer: Annotated[str | None, Option("another tokenizer than the source's own", "NAME")] = None
    revision: Annotated[str | None, Option("commit, branch or tag of a Hub repository")] = None
    sentence_head: Annotated[
        Literal["source", "none", "mean", "cls", "max"],
        Option(
            "what makes vectors behind the encoder, for sentence-transformers: the source's own modules, if it has "
            "any; none; or a pooling in their place (default: %(default)s)"
        ),
    ] = "source"
    seed: Annotated[int, Option("of the text that is drawn (default: %(default)s)")] = 0
    length_correction: bool | None = None  # of LinformerConfig; by default where it is calibrated
    cache_dir: str | None = None  # as in PretrainingData


@dataclass
class Export:
    folder: Annotated[str | Path, Argument("FOLDER", "a saved model, as a run or `convert` leaves it")]
    format: Annotated[str, Option("onnx (default: %(default)s)", "FORMAT")] = "onnx"
    output: Annotated[
        str | Path | None, Option("default: FOLDER/model.onnx; of a sentence encoder FOLDER/onnx/model.onnx", "FILE")
    ] = None
    opset: Annotated[int | None, Option("ONNX opset, 18 or later; default: the exporter's", "N")] = None


@dataclass
class Embed:
    folder: Annotated[
        str | Path, Argument("FOLDER", "a sentence-transformers folder, or an encoder, whose tokens are then averaged")
    ]
    files: Annotated[
        str | Path | Sequence[str | Path],
        Argument(
            "FILES", "documents: .txt (one in each), .jsonl, .json, .csv, .tsv, .parquet, folders, globs; hub:NAME"
        ),
    ]
    _: KW_ONLY
    output: Annotated[str | Path, Option("the .parquet file to write", "FILE")]
    column: Annotated[str, Option("which holds the text (default: %(default)s)", "NAME")] = "text"
    pieces: Annotated[int | None, Option("a vector for each piece of so many tokens", "TOKENS")] = None
    sentences: Annotated[bool, Option("a vector for each sentence")] = False
    spans: Annotated[
        str | None, Option("a vector for each span in that column: lists of [start, end] characters", "COLUMN")
    ] = None
    alone: Annotated[bool, Option("read each piece, sentence or span by itself, as if it were a document")] = False
    blend: Annotated[bool, Option("half of each: the part read by itself, and within its document")] = False
    max_length: Annotated[int | None, Option("most tokens of a document; default: the folder's", "N")] = None
    batch_tokens: Annotated[int, Option("tokens in a batch (default: %(default)s)", "TOKENS")] = 8192
    prompt_name: Annotated[str | None, Option("one of the folder's; default: that of documents", "NAME")] = None
    dtype: Annotated[Literal["float32", "bfloat16"], Option("of the weights (default: %(default)s)")] = "float32"
    revision: Annotated[str | None, Option("commit, branch or tag of a Hub repository")] = None
    device: str | None = None  # by default the accelerator, if there is one


@dataclass
class Push:
    folder: Annotated[str | Path, Argument("FOLDER", "what a run or save_pretrained left: weights, tokenizer, card")]
    repository: Annotated[str, Argument("USER/NAME", "created if it is not there")]
    _: KW_ONLY
    private: Annotated[bool, Option("create it as a private repository")] = False
    revision: Annotated[str | None, Option("a branch, created if it is not there; default: main", "R")] = None
    dry_run: Annotated[bool, Option("check and list the files, send nothing")] = False


@dataclass
class App:
    folder: Annotated[str | Path, Argument("FOLDER", "a saved model, as a run or `convert` leaves it")]
    source: Annotated[
        str | None,
        Option(
            "what it was converted from, to compare with; default: what the conversion noted, if that is a folder",
            "SOURCE",
        ),
    ] = None
    port: Annotated[int | None, Option("default: the first free one from 7860 on", "PORT")] = None
    show: Annotated[bool, Option("open a browser")] = False


Given = ParamSpec("Given")
Options = TypeVar("Options")
Result = TypeVar("Result")


def takes(
    options: Callable[Given, Options],
) -> Callable[[Callable[[Options], Result]], Callable[Given, Result]]:
    """Let a verb that is written as `verb(options)` be called, and shown by help(), as `verb(source, output, ...)`."""

    def decorate(verb: Callable[[Options], Result]) -> Callable[Given, Result]:
        @functools.wraps(verb)
        def call(*arguments: Given.args, **named: Given.kwargs) -> Result:
            return verb(options(*arguments, **named))

        kinds, plain = get_type_hints(options), inspect.signature(options)
        shown = [one.replace(annotation=kinds[name]) for name, one in plain.parameters.items()]
        result = inspect.signature(verb).return_annotation
        call.__signature__ = plain.replace(parameters=shown, return_annotation=result)  # type: ignore[attr-defined]
        texts = "\n".join(f"    {name}: {text}" for name, text in help_texts(options).items())
        call.__doc__ = f"{inspect.cleandoc(verb.__doc__ or '')}\n\nArgs:\n{texts}\n"
        return call

    return decorate


def marks(options: Any) -> dict[str, tuple[Any, Any, Argument | Option]]:
    """Name -> (type, default, mark) of what the command line knows."""
    hints = get_type_hints(options, include_extras=True)
    return {
        one.name: (hints[one.name].__origin__, one.default, hints[one.name].__metadata__[0])
        for one in fields(options)
        if hasattr(hints[one.name], "__metadata__")
    }


def help_texts(options: Any) -> dict[str, str]:
    return {name: mark.help % {"default": default} for name, (_, default, mark) in marks(options).items() if mark.help}
