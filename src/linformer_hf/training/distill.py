"""`linformer-hf distill RECIPE.yaml`: train a converted model to give what its source gives, through Trainer.

A recipe has the sections `model` (DistillModel), `distillation` (Distillation), `data` (PretrainingData), `training`
(TrainingArguments, verbatim) and, where rows are to be found by their passages, `search` (passages.Search). The loss is
the mean relative square error of every layer's hidden state, plus one minus the cosine of the pooled embeddings, plus,
where the source has a masked-LM or task head, the Kullback-Leibler divergence of its answers. The teacher is the exact
twin of the source (K = N). Of rows that are longer than the source reads it reads windows
(`conversion.shorten.Windows`): it was trained to attend no further. What it would answer for all of such a row, a class
say, windows do not tell, so there its states alone teach. With `distillation.pieces_weight` the vector of a long row
learns to be the mean of those that the teacher makes of its pieces.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from .. import modeling_linformer
from ..conversion import fidelity, fidelity_page
from ..conversion.calibrate import relative_error
from ..conversion.huggingface import read_source
from ..conversion.shorten import Windows, exact_twin
from ..conversion.sources import Source
from ..conversion.texts import draw, text_rows
from ..data.corpus import PreparedCorpus, prepare
from ..data.documents import PretrainingData
from ..data.masking import IGNORE, DrawnDataset, EpochCallback, MaskedDataset, Masker, pad_collate
from ..hub import sentence_head
from ..hub.card import CardMetadata, metadata_of
from ..modeling_linformer import LinformerForMaskedLM, LinformerForMultipleChoice, LinformerPreTrainedModel
from ..utils.files import loading
from ..utils.recipe import Recipe, RecipeError, load_recipe
from .agreement import check_rows
from .passages import Draw, PassageCollator, Search, mean_state, pieces_loss, search_loss, taken
from .run import Run, begin_run, last_evaluation, open_run, results, save_final, train, write_results, writing


# Gates, E, F and the length corrections: what leaves a row of at most K tokens exactly as it was.
SHORTENING = r"\.(projection|correction)\."

SMALLEST_PIECE = 8  # tokens, two of them special


@dataclass
class DistillModel:
    """Section `model`.

    Args:
        student: folder or Hub name of a converted model (`linformer-hf convert`).
        teacher: its source, by name or folder.
        positions: how the student's positions were extended, if they were.
        revision: of the teacher's Hub repository.
    """

    student: str
    teacher: str
    positions: Literal["repeat", "interpolate"] = "repeat"
    revision: str | None = None


@dataclass
class Distillation:
    """Section `distillation`.

    Args:
        trainable: `shortening`: only gates, E, F and length corrections, so that inputs of at most K tokens stay exact
            (pooled types); `encoder`: every weight of the encoder's layers.
        hidden_weight, embedding_weight, answer_weight: of the three parts of the loss that compare what student and
            teacher make of the rows. Where all are 0 the teacher does not read them.
        pieces_weight: of the part that brings a long row's vector near those of its pieces, read alone by the teacher.
        pieces: sizes of these, in tokens.
        validation_rows: held-out rows for the validation loss and the fidelity report.
    """

    trainable: Literal["shortening", "encoder"] = "shortening"
    hidden_weight: float = 1.0
    embedding_weight: float = 1.0
    answer_weight: float = 1.0
    pieces_weight: float = 0.0
    pieces: list[int] = field(default_factory=lambda: [128, 256, 512])
    validation_rows: int = 48

    def __post_init__(self) -> None:
        if self.validation_rows < 1:
            raise ValueError(f"validation_rows must be at least 1, got {self.validation_rows}.")
        if min(self.hidden_weight, self.embedding_weight, self.answer_weight, self.pieces_weight) < 0:
            raise ValueError("the weights of the loss must be at least 0.")
        if not self.pieces or min(self.pieces) < SMALLEST_PIECE:
            raise ValueError(f"pieces must name sizes of at least {SMALLEST_PIECE} tokens, got {self.pieces}.")

    def any(self) -> bool:
        return max(self.hidden_weight, self.embedding_weight, self.answer_weight) > 0


SECTIONS = {
    "model": DistillModel,
    "distillation": Distillation,
    "data": PretrainingData,
    "training": TrainingArguments,
    "search": Search,
    "card": CardMetadata,
}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A distillation recipe, every section of it checked. Raises RecipeError."""
    built = ("model", "distillation", "data", "search")
    recipe = load_recipe(path, overrides, sections=SECTIONS, built=built)
    if recipe.build("data").streaming:
        raise RecipeError("distill reads a prepared corpus: leave data.streaming out.")
    if not recipe.build("search").weight:
        weights = recipe.build("distillation")
        if not weights.any() and not weights.pieces_weight:
            raise RecipeError(
                "every weight of the loss is 0, pieces_weight and search.weight too: nothing is left to learn."
            )
    elif (size := recipe.values("training").get("per_device_train_batch_size", 8)) < 2:
        raise RecipeError(
            "search tells the rows of a batch from each other: training.per_device_train_batch_size must be at least "
            f"2, got {size}."
        )
    return recipe


class Distiller(Trainer):
    """Trainer with the distillation loss: `compute_loss` is the place that it documents for that."""

    def __init__(
        self, teacher: LinformerPreTrainedModel, weights: Distillation, search: Search, source: Source, **arguments: Any
    ):
        super().__init__(**arguments)
        self.teacher, self.weights, self.search, self.source = teacher.to(self.args.device), weights, search, source
        # The loss is a mean over this batch, so Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        self.label_names: list[str] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, mask, found = inputs.pop("labels", None), inputs["attention_mask"], taken(inputs)
        if isinstance(self.teacher, LinformerForMultipleChoice):
            inputs = {name: value[:, None] for name, value in inputs.items()}  # one choice
        given = model(**inputs, output_hidden_states=True)
        states, head = given.hidden_states[-1], self.source.sentence
        vectors = head or mean_state
        with_pieces = head is None or not head.reads_one_token
        loss = states.sum() * 0.0  # a gradient also for a batch without a passage
        if self.weights.any():
            goal = read_windows(self.teacher, inputs, self.source)
            loss = loss + distillation_loss(given, goal, mask, labels, self.weights, vectors)
        if "passages" in found:
            with torch.no_grad():
                read = self.teacher.base_model(found["passages"], attention_mask=found["passages_mask"])
            passages = vectors(read.last_hidden_state, found["passages_mask"])
            part = search_loss(states, mask, passages, found, self.search.scale, vectors, with_pieces)
            loss = loss + self.search.weight * part
        if self.weights.pieces_weight:
            encoder, ids = self.teacher.base_model, inputs["input_ids"].flatten(0, -2)
            part = pieces_loss(encoder, ids, states, mask, self.weights.pieces, vectors, with_pieces)
            loss = loss + self.weights.pieces_weight * part
        return (loss, {"loss": loss}) if return_outputs else loss


@torch.no_grad()
def read_windows(teacher: LinformerPreTrainedModel, inputs: dict[str, torch.Tensor], source: Source) -> Any:
    """What the teacher gives, with every layer's hidden states, where it reads windows of longer rows.

    Args:
        inputs: input_ids, attention_mask and the like, [B, N] each, or [B, 1, N] of one choice.
        source: the teacher's, which says what windows it was trained to read.

    Returns:
        The teacher's output if no row has more real tokens than the source's N; else hidden_states [B, N, C], 0 at
        padding, and logits [B, N, V] of a head that answers for each token.
    """
    mask = inputs["attention_mask"].flatten(0, -2).bool()
    if mask.sum(-1).max() <= source.length:
        return teacher(**inputs, output_hidden_states=True)
    whole: dict[str, torch.Tensor] = {}
    for i, real in enumerate(mask):
        windows = Windows.of(source, int(real.sum()))
        parts = {name: windows.split(value.flatten(0, -2)[i, real][None]) for name, value in inputs.items()}
        if inputs["input_ids"].dim() == 3:
            parts = {name: value[:, None] for name, value in parts.items()}
        read = teacher(**parts, output_hidden_states=True)
        found = {str(layer): states for layer, states in enumerate(read.hidden_states)}
        logits = getattr(read, "logits", None)
        if logits is not None and logits.dim() == 3:
            found["logits"] = logits
        for name, value in found.items():
            goal = whole.setdefault(name, value.new_zeros(*mask.shape, value.shape[-1]))
            goal[i, real] = windows.join(value)[0]
    answers = whole.pop("logits", None)
    return SimpleNamespace(hidden_states=tuple(whole.values()), logits=answers)


def distillation_loss(
    given: Any,
    goal: Any,
    mask: torch.Tensor,
    labels: torch.Tensor | None,
    weights: Distillation,
    vectors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = mean_state,
) -> torch.Tensor:
    """Loss of outputs with hidden states [B, N, C] each, over the real tokens that mask [B, N] marks; a scalar.

    `labels` [B, N] marks the tokens behind masks with anything but -100; without it, answers of whole rows count.
    `vectors` makes embeddings [B, D] of states [B, N, C] and the mask.
    """
    real = mask.bool()
    errors = []
    for ours, theirs in zip(given.hidden_states[1:], goal.hidden_states[1:], strict=True):
        ours, theirs = ours.float()[real], theirs.float()[real]
        errors.append((ours - theirs).square().sum() / theirs.square().sum())
    loss = weights.hidden_weight * torch.stack(errors).mean()
    pooled = [vectors(states.float(), real) for states in (given.hidden_states[-1], goal.hidden_states[-1])]
    loss = loss + weights.embedding_weight * (1 - torch.cosine_similarity(pooled[0], pooled[1])).mean()
    for name in ("logits", "start_logits", "end_logits"):
        ours, theirs = getattr(given, name, None), getattr(goal, name, None)
        if ours is None or theirs is None:
            continue
        if labels is not None:
            ours, theirs = ours[labels != IGNORE], theirs[labels != IGNORE]
        elif ours.dim() == 3:
            ours, theirs = ours[real], theirs[real]
        elif name != "logits":  # the answer's start or end is no padding
            ours, theirs = (logits.float().masked_fill(~real, -1e4) for logits in (ours, theirs))
        divergence = torch.nn.functional.kl_div(
            ours.float().log_softmax(-1), theirs.float().log_softmax(-1), reduction="sum", log_target=True
        )
        loss = loss + weights.answer_weight * divergence / max(len(ours), 1)  # a batch may have no masked token
    return loss


def distill(recipe_path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> Path:
    """Distil as the recipe says: a YAML file, with `section.key=value` applied over it.

    Args:
        resume: continue the last whole checkpoint in `training.output_dir`.

    Returns:
        The folder of the run: the student, results.json, curve.png and the fidelity report.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        FileExistsError: the folder is not empty and `resume` is False.
        Interrupted: SIGTERM or Ctrl-C during training; a checkpoint has been written.
        FloatingPointError: the loss is not finite.
        ConversionError, ValueError: teacher and student do not belong together; the message says why.
    """
    recipe = read_recipe(recipe_path, overrides)
    section, weights = recipe.build("model"), recipe.build("distillation")
    run = open_run("distill", recipe.values("training").get("output_dir"), recipe.raw, resume)
    arguments: TrainingArguments = recipe.build("training")
    set_seed(arguments.seed)
    source = read_source(section.teacher, section.revision)
    student, kept = load_student(section, source)
    source = replace(source, sentence=read_head(section))
    length = student.config.max_position_embeddings
    teacher = exact_twin(source, length, section.positions)
    check_pair(section, student, teacher, source.length)
    data: PretrainingData = recipe.build("data")
    if (data.sequence_length or 0) > length:
        raise ValueError(f"data.sequence_length={data.sequence_length} is longer than the student reads ({length}).")
    search: Search = recipe.build("search")
    if weights.pieces_weight and max(weights.pieces) > source.length:
        raise ValueError(f"distillation.pieces={weights.pieces}: the source reads at most {source.length} tokens.")
    if search.weight and search.longest > source.length - 2:
        raise ValueError(f"search.longest={search.longest}: the source reads passages of at most {source.length - 2}.")
    with arguments.main_process_first(desc="preparing the corpus"):
        data.tokenizer = data.tokenizer or section.student
        corpus = prepare(data, data.sequence_length or length)
        held_out = held_out_rows(corpus, data, length, weights.validation_rows)
    check_rows(corpus=corpus.checksum)
    difference = fidelity.check_twin(source, teacher, held_out)
    choose_trainable(student, weights.trainable)
    trainer = build_trainer(teacher, student, weights, search, source, arguments, data, corpus)
    begin_run(run)
    trained = train(trainer, run.folder, run, resume)
    evaluated = last_evaluation(trainer) or trainer.evaluate()
    for name, value in kept.items():
        setattr(student.config, name, value)
    sentence = source.sentence
    save_final(trainer, run.folder, lambda beside: sentence.write(beside, length) if sentence else None)
    if trainer.is_world_process_zero():
        # Loaded anew: Trainer has wrapped this one's forward in autocast, and what was saved is what is reported on.
        saved = load_student(replace(section, student=str(run.folder)), source)[0].eval()
        found = fidelity.report(source, teacher.to("cpu"), saved, held_out, difference)
        with writing(run.folder):
            report(run, trainer, saved, source, found, corpus.counts, {**trained, **evaluated})
        run.tell(fidelity_page.summary_table(found["lengths"]), f"Distilled model, {fidelity_page.REPORT_FILE}")
    return run.folder


def load_student(section: DistillModel, source: Source) -> tuple[LinformerPreTrainedModel, dict[str, Any]]:
    """The student without dropout, and the dropout rates to write into its configuration again at the end."""
    kept: dict[str, Any] = {}
    model_class = getattr(modeling_linformer, f"Linformer{source.head}")
    pooler = {"add_pooling_layer": source.with_pooler} if source.head == "Model" else {}
    with loading(section.student):
        config = model_class.config_class.from_pretrained(section.student)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            kept[name] = getattr(config, name)
            setattr(config, name, 0.0)
        student, info = model_class.from_pretrained(
            section.student,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **pooler,
        )
    theirs = source.config
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(config, name) != theirs[name]:
            raise ValueError(
                f"the student {section.student!r} has {name}={getattr(config, name)}, the teacher {section.teacher!r} "
                f"{theirs[name]}: it was not converted from this teacher."
            )
    if source.head.endswith("Classification") and config.id2label != theirs.get("id2label", config.id2label):
        raise ValueError(
            f"the student {section.student!r} has the classes {', '.join(config.id2label.values())}, the teacher "
            f"{section.teacher!r} {', '.join(theirs['id2label'].values())}: answers are compared by their numbers."
        )
    if info["missing_keys"]:  # transformers fills them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise ValueError(f"the student {section.student!r} lacks weights that the teacher has: {missing}.")
    return student, kept


def read_head(section: DistillModel) -> sentence_head.SentenceHead | None:
    """The student's sentence head, which makes the vectors; the teacher says how long its texts are."""
    with loading(section.student):
        head = sentence_head.read(section.student)
    with loading(section.teacher):
        return head and replace(head, length=sentence_head.longest_text(section.teacher, section.revision))


def check_pair(
    section: DistillModel, student: LinformerPreTrainedModel, teacher: LinformerPreTrainedModel, reads: int
) -> None:
    """Raise a ValueError unless student and teacher have the same embeddings, which neither verb trains.

    Of the positions the first `reads`, which the source has: behind them the student's may repeat another part.
    """
    ours, theirs = student.base_model.embeddings, teacher.base_model.embeddings
    for name, reason in (
        ("word_embeddings", "it was not converted from this teacher"),
        ("position_embeddings", "set model.positions to what it was converted with"),
    ):
        # Far above half precision's rounding.
        weights = [getattr(side, name).weight.detach() for side in (ours, theirs)]
        mine, its = [rows[:reads] if name == "position_embeddings" else rows for rows in weights]
        if relative_error([mine], [its]) > 0.05:
            raise ValueError(
                f"the student {section.student!r} has other {name} than the teacher {section.teacher!r}: {reason}."
            )


def held_out_rows(
    corpus: PreparedCorpus, data: PretrainingData, length: int, rows: int
) -> dict[str, list[torch.Tensor]]:
    """What the report measures on, by genre: the corpus's validation documents, and text that no corpus has."""
    unseen = text_rows(None, corpus.tokenizer, length, 0, (rows + 1) // 2, cache_dir=data.cache_dir).held_out
    own = draw(corpus.validation["input_ids"], length, rows, 0)
    return {**({"held-out documents of the corpus": own} if own else {}), **unseen}


def choose_trainable(student: LinformerPreTrainedModel, trainable: str) -> None:
    """Freeze what is not to be trained. Raises a ValueError if nothing is left."""
    pattern = SHORTENING if trainable == "shortening" else r"encoder\.layer\.|encoder\.projection\."
    left = 0
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(re.search(pattern, f".{name}") is not None)
        left += parameter.requires_grad
    if not left:
        raise ValueError(
            "the student has neither gates nor E, F nor length corrections to train. Convert it with --calibrate, or "
            "set distillation.trainable=encoder."
        )


def build_trainer(
    teacher: LinformerPreTrainedModel,
    student: LinformerPreTrainedModel,
    weights: Distillation,
    search: Search,
    source: Source,
    arguments: TrainingArguments,
    data: PretrainingData,
    corpus: PreparedCorpus,
) -> Distiller:
    count = min(weights.validation_rows, len(corpus.validation))
    order = torch.randperm(len(corpus.validation), generator=torch.Generator().manual_seed(data.seed))[:count]
    train: Any = corpus.train
    validation: Any = corpus.validation.select(order.tolist())
    collate: Any = DataCollatorWithPadding(corpus.tokenizer)
    if search.weight:
        draw = Draw(search, data.seed)
        train, validation = DrawnDataset(train, draw), DrawnDataset(validation, draw, static=True)
        collate = PassageCollator(corpus.tokenizer)
        arguments.remove_unused_columns = False  # passages are no argument of the model's
    elif isinstance(student, LinformerForMaskedLM):
        masker = Masker(corpus.tokenizer, data.seed, data.mlm_probability, data.mask_fractions, data.whole_word_masking)
        train, validation = MaskedDataset(train, masker), MaskedDataset(validation, masker, static=True)
        collate = pad_collate(corpus.tokenizer)
    return Distiller(
        teacher=teacher,
        weights=weights,
        search=search,
        source=source,
        model=student,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        processing_class=corpus.tokenizer,
        callbacks=[EpochCallback(train)] if isinstance(train, DrawnDataset) else [],
    )


def report(
    run: Run,
    trainer: Distiller,
    student: LinformerPreTrainedModel,
    source: Source,
    found: dict[str, Any],
    counts: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """The fidelity report `found`, curve.png, README.md and results.json."""
    fidelity_page.write(run.folder, found)
    measured = {
        "parameters": sum(p.numel() for p in student.parameters()),
        "parameters trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "optimizer steps": trainer.state.global_step,
        "validation loss": metrics["eval_loss"],
        "training, s": metrics["train_runtime"],
        "skipped steps": metrics["skipped_steps"],
        "wall time, s": run.seconds,
    }
    facts = {**fidelity_page.card(student, source, found, measured), **metadata_of(run.recipe)}
    content = results(run, trainer, data=counts, metrics=measured, card=facts, fidelity=found)
    write_results(run, content, "Distillation")
