"""BERT's masking as a pure function of (seed, epoch, row), so that a resumed run masks as the uninterrupted one.

A collator that draws from a running generator does not: after a resume it stands elsewhere in its stream. Here every
row seeds its own generator. Trainer tells the epoch through `EpochCallback`; a stream counts its passes itself.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase, TrainerCallback


IGNORE = -100  # the label of a token that has none


class Masker:
    """Chooses tokens with probability p and replaces them: by [MASK], by a random token, or not at all.

    Args:
        tokenizer: gives the special tokens, which are never chosen, and [MASK].
        mlm_probability: p, the share of tokens (with `whole_word`: of words) that are predicted.
        mask_fractions: shares of the chosen tokens that become [MASK], a random token, or stay (BERT: 0.8, 0.1, 0.1).
        whole_word: choose words, all of whose tokens are then predicted.

    Raises:
        ValueError: the tokenizer has no [MASK], or a share is out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        mlm_probability: float = 0.15,
        mask_fractions: Sequence[float] = (0.8, 0.1, 0.1),
        whole_word: bool = False,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no mask token; masked-language-model pretraining needs "
                "one (tokenizer.add_special_tokens({'mask_token': '[MASK]'}), or another tokenizer)."
            )
        if not 0 < mlm_probability < 1:
            raise ValueError(f"mlm_probability must lie between 0 and 1, got {mlm_probability}.")
        if len(mask_fractions) != 3 or min(mask_fractions) < 0 or abs(sum(mask_fractions) - 1) > 1e-6:
            raise ValueError(
                f"mask_fractions must be three shares that sum to 1 ([MASK], random, unchanged), got {mask_fractions}."
            )
        self.seed = seed
        self.probability = mlm_probability
        self.fractions = tuple(mask_fractions)
        self.mask_id = tokenizer.mask_token_id
        self.special = np.zeros(len(tokenizer), dtype=bool)
        self.special[list(tokenizer.all_special_ids)] = True
        self.ordinary = np.flatnonzero(~self.special)  # what a random token is drawn from
        self.continues = continues_word(tokenizer) if whole_word else None

    def __call__(self, ids: Sequence[int], epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids and labels ([n] each, labels -100 where nothing is predicted) of row `index` in `epoch`."""
        inputs = np.array(ids, dtype=np.int64)  # a copy: it is written to
        generator = np.random.default_rng((self.seed, epoch, index))
        draw = generator.random((2, len(inputs)))
        if self.continues is not None:
            # A special token starts a "word" too, so no word reaches across it.
            inside = self.continues[inputs] & ~self.special[inputs]
            inside[0] = False
            draw[0] = draw[0][np.maximum.accumulate(np.where(inside, 0, np.arange(len(inputs))))]
        chosen = (draw[0] < self.probability) & ~self.special[inputs]
        labels = np.where(chosen, inputs, IGNORE)
        masked, random, _ = self.fractions
        inputs[chosen & (draw[1] < masked)] = self.mask_id
        replaced = chosen & (draw[1] >= masked) & (draw[1] < masked + random)
        inputs[replaced] = generator.choice(self.ordinary, size=int(replaced.sum()))
        return inputs, labels

    def item(self, ids: Sequence[int], epoch: int, index: int) -> dict[str, Any]:
        """The same as a row of a batch."""
        inputs, labels = self(ids, epoch, index)
        return {"input_ids": inputs, "labels": labels}


def continues_word(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[vocabulary] bool: tokens that go on with the word before them, in WordPiece (`##ing`) or byte-level BPE.

    Raises:
        ValueError: the vocabulary marks neither.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    pieces = np.array([token.startswith("##") for token in tokens])
    starts = np.array([token.startswith("Ġ") for token in tokens])
    if starts.any():  # byte-level BPE marks the words' starts (the space in front of them)
        return ~starts
    if pieces.any():
        return pieces
    raise ValueError(
        "whole_word_masking needs a WordPiece ('##') or byte-level BPE ('Ġ') vocabulary, and "
        f"{tokenizer.name_or_path!r} is neither; set data.whole_word_masking=false."
    )


class SharedRows(Protocol):
    """Rows that several readers share, such as StreamedRows."""

    def share(self, number: int, of: int) -> Iterator[dict[str, Any]]: ...


class DrawnDataset(torch.utils.data.Dataset):
    """Rows of ids -> what `draw(ids, epoch, index)` makes of them, anew in each epoch (or once for all if `static`)."""

    def __init__(self, rows: Dataset, draw: Callable[[Sequence[int], int, int], dict[str, Any]], static: bool = False):
        self.rows, self.draw, self.static = rows, draw, static
        # Shared with a DataLoader's workers, which may live for many epochs (dataloader_persistent_workers).
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(0 if self.static else epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A whole batch at once: the DataLoader calls this where it exists, and Arrow reads it in one go."""
        rows = zip(indices, self.rows[indices]["input_ids"], strict=True)
        return [self.draw(ids, self.epoch, index) for index, ids in rows]


class MaskedDataset(DrawnDataset):
    """Rows of ids -> {input_ids, labels}, masked."""

    def __init__(self, rows: Dataset, masker: Masker, static: bool = False):
        super().__init__(rows, masker.item, static)


class MaskedStream(torch.utils.data.IterableDataset):
    """The same for rows that are read as a stream, again and again: pass and number in it seed a row's masks.

    Without an end, for Trainer does not know a stream's length: it would begin the second pass without noting that, and
    a resumed run would stand elsewhere. So a run's place is the number of its step alone, and a process whose share is
    smaller than the others' begins its next pass instead of keeping them waiting.

    Args:
        rows: `rows.share(i, n)` gives those of reader i of n from the beginning, at least one.
        readers: n. Process r of R has the readers r, r + R, ..., which its DataLoader's workers deal out likewise;
            where one has several, they give a row each in turn.
        process, processes: r and R. Of every R batches only the r-th is real, for accelerate's IterableDatasetShard
            takes that one; nothing is read or tokenised for the others.
        batch: rows that a process takes at once.
    """

    def __init__(
        self, rows: SharedRows, masker: Masker, readers: int = 1, process: int = 0, processes: int = 1, batch: int = 1
    ):
        self.rows, self.masker, self.readers = rows, masker, readers
        self.process, self.processes, self.batch = process, processes, batch

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = torch.utils.data.get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        own = range(self.process + number * self.processes, self.readers, of * self.processes)
        rows = self._in_turn([self._endless(reader) for reader in own])
        while True:
            yield from itertools.repeat(None, self.process * self.batch)
            yield from itertools.islice(rows, self.batch)
            yield from itertools.repeat(None, (self.processes - 1 - self.process) * self.batch)

    def _endless(self, reader: int) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            index = reader  # no other reader's row has the number, whose masks it would get
            for row in self.rows.share(reader, self.readers):
                yield self.masker.item(row["input_ids"], epoch, index)
                index += self.readers
            if index == reader:
                raise ValueError(
                    f"the stream holds no rows for reader {reader} of {self.readers}: its documents hold no text. Set "
                    "data.readers to a smaller number, or prepare the corpus (data.streaming=false)."
                )

    @staticmethod
    def _in_turn(readers: Sequence[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        for reader in itertools.cycle(readers):
            yield next(reader)


class EpochCallback(TrainerCallback):
    """Tells the training rows which epoch they are in. Accelerate does so only where its sampler has no epoch."""

    def __init__(self, dataset: DrawnDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))  # 0.5 when resuming within epoch 0


def pad_collate(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
    """Pads input_ids with the padding token, labels with -100, and adds the attention mask."""
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORE)


def unigram_baseline(token_counts: np.ndarray, masked: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How well the training tokens' frequencies alone predict the masked tokens of `masked`.

    Args:
        token_counts: [V], how often each token stands in the training text (one is added to each).
        masked: rows with `labels`.

    Returns:
        loss in nats, perplexity, accuracy (of always answering the most frequent token), masked tokens.
    """
    counts = token_counts + 1.0
    log_probability = np.log(counts / counts.sum())
    labels = np.concatenate([np.asarray(row["labels"]) for row in masked])
    labels = labels[labels != IGNORE]
    loss = float(-log_probability[labels].mean())
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "accuracy": float((labels == counts.argmax()).mean()),
        "masked_tokens": int(labels.size),
    }
