"""Corpora that are read while training: what reaches the model, over passes, workers and interruptions."""

from pathlib import Path

import pytest
from transformers import Trainer

from helpers import MODEL, TRAINING, N, assert_same_run, write_recipe
from linformer_hf import cli
from linformer_hf.data.corpus import prepare
from linformer_hf.data.masking import Masker
from linformer_hf.training.pretrain import read_recipe


Row = tuple[list[int], list[int]]  # ids and labels

ROWS = 7  # in a step: so that neither pass nor source ends with a step
VARIANTS = {
    "one after the other": ([None, None], "full_sentences", 0, None),
    "three readers": ([2.0, 1.0, 1.0], "contiguous", 0, 3),
    "two workers": ([2.0, 1.0, 1.0], "full_sentences", 2, None),
    "whole documents": ([None, None, None], "document", 2, 4),
}


class Killed(BaseException):
    """Nothing handles it: as if the process were gone."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("streaming")


@pytest.fixture(scope="module", params=VARIANTS)
def recipe(request, texts, tiny_source, place) -> tuple[str, int, int]:
    """A recipe, how many rows its sources hold, and the workers that read them."""
    weights, packing, workers, readers = VARIANTS[request.param]
    parts = ["0*.txt", "1*.txt", "0[5-9].txt"][: len(weights)]
    sources = [{"kind": "files", "path": f"{texts}/{part}"} for part in parts]
    sources = [{**source, "weight": w} if w else source for source, w in zip(sources, weights, strict=True)]
    data = {"sources": sources, "streaming": True, "validation_documents": 2, "packing": packing}
    data["readers"] = readers
    data["tokenizer"] = str(tiny_source())
    training = {**TRAINING, "logging_steps": 1, "save_steps": 3, "eval_steps": 100, "dataloader_num_workers": workers}
    training |= {"per_device_train_batch_size": ROWS, "max_steps": 1}
    path = write_recipe(place / f"{request.param.replace(' ', '-')}.yaml", model=MODEL, data=data, training=training)
    return path, sum(1 for _ in prepare(read_recipe(path).build("data"), N).train), workers


@pytest.fixture
def trained(monkeypatch):
    """`trained(step)` kills the run in that step; it returns what was trained on: step -> rows of ids and labels."""
    seen: dict[int, list[Row]] = {}
    whole = Trainer.training_step

    def patch(until: int) -> dict[int, list[Row]]:
        def training_step(self, model, inputs, *arguments):
            step = self.state.global_step
            if step == until:
                raise Killed
            lengths = inputs["attention_mask"].sum(1).tolist()
            rows = zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), lengths, strict=True)
            seen[step] = [(ids[:length], labels[:length]) for ids, labels, length in rows]
            return whole(self, model, inputs, *arguments)

        monkeypatch.setattr(Trainer, "training_step", training_step)
        return seen

    return patch


def expected(recipe: str, workers: int, steps: int) -> list[list[Row]]:
    """Step by step: the documents pass after pass, of which worker i of n has every n-th from the i-th on.

    Where there are more readers than workers, each worker has several, and takes a row of each in turn.
    """
    data = read_recipe(recipe).build("data")
    corpus = prepare(data, N)
    masker, of = Masker(corpus.tokenizer, data.seed), max(1, workers)
    readers = data.readers or of
    endless: list[list[Row]] = []
    for reader in range(readers):
        rows, drawn = [row["input_ids"] for row in corpus.train.share(reader, readers)], []
        for i in range((steps + workers) * ROWS):
            ids, labels = masker(rows[i % len(rows)], i // len(rows), i % len(rows) * readers + reader)
            drawn.append((ids.tolist(), labels.tolist()))
        endless.append(drawn)
    shares = [[row for rows in zip(*endless[i::of], strict=True) for row in rows] for i in range(of)]
    return [shares[step % of][step // of * ROWS :][:ROWS] for step in range(steps)]


def test_every_row_is_trained_on_in_its_turn_over_passes_and_interruptions(recipe, trained, tmp_path):
    path, rows, workers = recipe
    steps = int(2.5 * rows / ROWS)
    wanted = dict(enumerate(expected(path, workers, steps)))
    assert all(len(batch) == ROWS for batch in wanted.values())
    command = ["pretrain", path, f"training.max_steps={steps}"]
    seen = trained(steps)
    assert cli.main([*command, f"training.output_dir={tmp_path / 'whole'}"]) == 0
    assert seen == wanted
    resume: list[str] = []
    for until in (steps // 3, steps // 2, steps - 1):  # in each of the passes
        seen.clear()
        trained(until)
        with pytest.raises(Killed):
            cli.main([*command, f"training.output_dir={tmp_path / 'killed'}", *resume])
        assert seen
        assert seen == {step: wanted[step] for step in seen}
        resume = ["--resume"]
    seen.clear()
    trained(steps)
    assert cli.main([*command, f"training.output_dir={tmp_path / 'killed'}", "--resume"]) == 0
    assert 0 < len(seen) < steps
    assert seen == {step: wanted[step] for step in range(min(seen), steps)}
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
