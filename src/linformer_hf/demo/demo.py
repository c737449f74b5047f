"""`linformer-hf demo`: pretrain and fine-tune a small Linformer on real text, load it, report what it learned.

The text comes from installed packages (extra `demo`), the two recipes from this package. The report compares every
number with what needs no model: token frequencies, the majority class, rare pairs of words; and with the same
fine-tuning from random weights.
"""

import logging
import math
import shutil
import statistics
import time
from importlib import resources
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from ..data.demo_texts import DEMO_PACKAGES, installed_path
from ..data.task_sources import load_task
from ..data.tasks import TaskData
from ..training.finetune import finetune
from ..training.pretrain import pretrain
from ..utils.figures import new_figure, save_figure
from ..utils.files import RESULTS_FILE, read_json, write_json, write_text
from ..utils.options import Demo, takes
from ..utils.reporting import markdown_table


logger = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
MASKED_SENTENCES = (
    "the lord spoke to [MASK], saying,",
    "i say to you, he who believes has eternal [MASK].",
    "the king of [MASK] sent men to the city.",
    "my lord, i will [MASK] you to - morrow.",
    "what is thy name? thou [MASK] a villain!",
    "if the function is [MASK] with an argument, it returns none.",
)
TASK: Final = "word-order"
WORDS_SHOWN = 16  # of a verse in the report, at most
FOLDERS = {True: "finetuned", False: "from-random"}


@takes(Demo)
def demo(options: Demo) -> Path:
    """Run the demo in the folder `output`.

    Raises:
        FileExistsError: the folder holds something and `force` is False.
        FileNotFoundError: the demo's text is not installed; the message holds the command.
    """
    started = time.time()
    folder = Path(options.output)
    for package in DEMO_PACKAGES:
        installed_path(package, "__init__.py")
    if folder.exists() and any(folder.iterdir()):
        if not options.force:
            raise FileExistsError(f"{folder} is not empty: add --force to delete it first, or name another --output.")
        if not (folder / "pretrained").exists():
            raise FileExistsError(f"{folder} holds no earlier demo; --force deletes demos only. Name another --output.")
        shutil.rmtree(folder)
    # Only CPUs that multiply bfloat16 in hardware gain from it; the others would emulate it, slowly.
    half = f"training.bf16={'true' if torch.cpu._is_avx512_bf16_supported() else 'false'}"

    logger.info(
        "1/3  Pretraining on Shakespeare, Milton, the World English Bible and Python's topics, into %s",
        folder / "pretrained",
    )
    pretrained = pretrain(recipe("pretrain"), [f"training.output_dir={folder / 'pretrained'}", half])
    runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    logger.info("2/3  Fine-tuning on word-order: %d seeds from these weights, and from random ones", len(SEEDS))
    for seed in SEEDS:
        for learned in (True, False):
            place = finetune(
                recipe("finetune"),
                [
                    f"model.checkpoint={pretrained}",
                    f"model.random_weights={'false' if learned else 'true'}",
                    f"training.output_dir={folder / f'{FOLDERS[learned]}-{seed}'}",
                    f"training.seed={seed}",
                    half,
                ],
            )
            runs[learned].append(_results(place))
    logger.info("3/3  Loading both with the Auto classes and pipelines")
    content = summary(_results(pretrained), runs, time.time() - started)
    content["fillings"] = fill_masks(pretrained)
    content["verses"] = classify_verses(folder / f"{FOLDERS[True]}-{SEEDS[0]}")
    plot(folder / "report.png", content, _results(pretrained))
    write_text(folder / "report.md", render(content, folder))
    write_json(folder / RESULTS_FILE, content)
    return folder


def told(folder: Path) -> tuple[str, str]:
    """What the command line says of a demo: Markdown, and a last line."""
    report = folder / "report.md"
    return report.read_text(encoding="utf-8"), f"Report: {report.resolve()}"


def recipe(name: str) -> Path:
    return Path(str(resources.files("linformer_hf.demo") / "recipes" / f"{name}.yaml"))


def _results(folder: Path) -> dict[str, Any]:
    return read_json(folder / RESULTS_FILE, "Give the same command with --force.")


def summary(pretrained: dict[str, Any], runs: dict[bool, list[dict[str, Any]]], seconds: float) -> dict[str, Any]:
    """The demo's own results.json; accuracies are shares of the test rows, one for each seed."""
    accuracies = {FOLDERS[kind]: [run["metrics"]["test_accuracy"] for run in runs[kind]] for kind in runs}
    return {
        "verb": "demo",
        **{key: pretrained[key] for key in ("versions", "revision", "device", "threads", "dtype", "parameters")},
        "pretraining": pretrained["metrics"],
        "accuracy": accuracies,
        "accuracy_gain": statistics.mean(accuracies["finetuned"]) - statistics.mean(accuracies["from-random"]),
        "baselines": runs[True][0]["baselines"],
        "test_rows": runs[True][0]["metrics"]["test_rows"],
        "pretraining_seconds": pretrained["wall_seconds"],
        "finetuning_seconds": sum(run["wall_seconds"] for kind in runs for run in runs[kind]),
        "wall_seconds": seconds,
    }


def fill_masks(folder: Path) -> list[tuple[str, list[tuple[str, float]]]]:
    """Each masked sentence with the three most likely fillings and their probabilities."""
    model = AutoModelForMaskedLM.from_pretrained(folder)
    fill = pipeline("fill-mask", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    answers = [fill(sentence, top_k=3) for sentence in MASKED_SENTENCES]
    return [
        (sentence, [(answer["token_str"], answer["score"]) for answer in given])
        for sentence, given in zip(MASKED_SENTENCES, answers, strict=True)
    ]


def classify_verses(folder: Path, count: int = 6) -> list[tuple[str, str, str, float]]:
    """Short rows of the test: the text, the right answer, the model's, and its probability."""
    task = load_task(TaskData(task=TASK))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    classify = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
    )
    short = task.test.filter(lambda text: len(text.split()) <= WORDS_SHOWN, input_columns="text")
    rows = short.shuffle(seed=0).select(range(count)).to_list()
    names = task.label_names or []
    return [
        (row["text"], names[row["label"]], answer["label"], answer["score"])
        for row, answer in zip(rows, classify([row["text"] for row in rows]), strict=True)
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def render(content: dict[str, Any], folder: Path) -> str:
    """The report in Markdown."""
    masked, accuracy, baselines = content["pretraining"], content["accuracy"], content["baselines"]
    seeds = len(accuracy["finetuned"])
    learned = markdown_table(
        ["masked tokens of held-out documents", "perplexity", "predicted exactly"],
        [
            ["this Linformer", masked["validation_perplexity"], masked["validation_masked_accuracy"]],
            ["token frequencies (unigram baseline)", masked["unigram_perplexity"], masked["unigram_masked_accuracy"]],
        ],
    )
    tuned = markdown_table(
        [f"{TASK}, books that pretraining held out", "test accuracy"],
        [
            [
                f"fine-tuned from the pretrained weights, {seeds} seeds (lowest to highest)",
                spread(accuracy["finetuned"]),
            ],
            [f"the same from random weights, {seeds} seeds", spread(accuracy["from-random"])],
            ["majority class", baselines["majority"]],
            ["threshold on how rare the rarest pairs of words are", baselines["rare_word_pairs"]],
        ],
    )
    filled = markdown_table(
        ["sentence", "fillings"],
        [[text, ", ".join(f"{word} {share:.2f}" for word, share in answers)] for text, answers in content["fillings"]],
    )
    verses = markdown_table(
        ["verse", "right answer", "model"],
        [[text, right, f"{given} {share:.2f}"] for text, right, given, share in content["verses"]],
    )
    return f"""# What the demo's Linformer learned

{content["parameters"] / 1e6:.2f} M parameters, {content["device"]}, {content["threads"]} threads, {content["dtype"]}; \
pretraining {content["pretraining_seconds"]:.0f} s, fine-tuning {content["finetuning_seconds"]:.0f} s, \
{content["wall_seconds"]:.0f} s in all.

![losses and accuracies](report.png)

{learned}

Measured on {masked["validation_masked_tokens"]:,} masked tokens; perplexity is {masked["perplexity_ratio"]:.1f} times \
below the unigram baseline's on the same masks.

{tuned}

{content["test_rows"]:,} test rows. Does a verse stand as it was written, or were two neighbouring words exchanged? \
The labels are constructed, so this is no number of CoLA's. The rule knows how often each pair of neighbouring words \
stands in the training verses.

{filled}

{verses}

Where everything lies: `{folder / "pretrained"}` (AutoModelForMaskedLM), `{folder / "finetuned-0"}` \
(AutoModelForSequenceClassification); each with results.json, curve.png and a model card. The prepared text is cached \
in the folder that `{folder / "pretrained" / "results.json"}` names under `data`.
"""


def plot(path: Path, content: dict[str, Any], pretrained: dict[str, Any]) -> None:
    """Pretraining's losses, and accuracy of every seed beside the baselines."""
    figure, (left, right) = new_figure((11, 4.2), ncols=2)
    history, masked = pretrained["history"], content["pretraining"]
    for key, label, style in (("loss", "training (30 % masked)", "-"), ("eval_loss", "validation (15 % masked)", "o")):
        points = [(row["step"], row[key]) for row in history if key in row]
        left.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    last = max(row["step"] for row in history)
    left.plot(last, masked["validation_loss"], "o", color="C1", markersize=4)
    unigram = math.log(masked["unigram_perplexity"])
    left.axhline(unigram, linestyle="--", linewidth=1, color="gray", label=f"unigram baseline ({unigram:.2f})")
    left.set(xlabel="optimizer step", ylabel="loss (nats)", title="Pretraining")
    left.legend()
    left.grid(alpha=0.3)
    names = {"finetuned": "pretrained\nweights", "from-random": "random\nweights"}
    for place, key in enumerate(names):
        values = content["accuracy"][key]
        right.bar(place, statistics.mean(values), width=0.55, color=f"C{place}", alpha=0.6)
        right.plot([place] * len(values), values, "k.", markersize=5)
    for name, value in content["baselines"].items():
        right.axhline(value, linestyle="--", linewidth=1, color="gray")
        right.text(1.95, value, f"{name.replace('_', ' ')} {value:.3f}", fontsize=8, va="bottom", ha="right")
    right.set_xticks(range(len(names)), list(names.values()))
    right.set(ylim=(0.4, 1), xlim=(-0.5, 2), ylabel="test accuracy", title=f"{TASK} (dots: seeds)")
    save_figure(figure, path)
