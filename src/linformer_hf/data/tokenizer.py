"""Tokenizers: trained on the documents, stored under their content, loaded; and labelled rows as a model reads them."""

import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from ..utils import checksums
from .cache import cache_folder, checksum, made_once
from .documents import PretrainingData
from .masking import IGNORE


logger = logging.getLogger(__name__)

BEYOND = 10**6  # where an answer lies that was cut off: the loss of every model passes over places beyond the row
Batch = Mapping[str, list[Any]]
Encoded = tuple[dict[str, Any], list[int], list[int]]  # columns, how many tokens each row lost, each piece's row


def train_tokenizer(texts: Iterable[str], data: PretrainingData) -> PreTrainedTokenizerBase:
    """A new WordPiece (BERT's) or byte-level BPE (RoBERTa's) tokenizer; equal texts, which are read twice, give one."""
    if data.tokenizer_type == "wordpiece":
        tokenizer = _train_wordpiece(texts, data)
    else:
        base = RobertaTokenizer(add_prefix_space=False)
        if data.lowercase:
            texts = (text.lower() for text in texts)
            base.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer = base.train_new_from_iterator(texts, data.vocab_size, show_progress=True)
    if data.tokenizer_type == "byte_level_bpe" and data.lowercase:
        # RobertaTokenizer builds itself anew when it is loaded, without a normalizer; this class keeps what is saved.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            model_input_names=tokenizer.model_input_names,
            **tokenizer.special_tokens_map,
        )
    logger.info("trained a %s tokenizer of %s tokens", data.tokenizer_type, f"{len(tokenizer):,}")
    return tokenizer


def _train_wordpiece(texts: Iterable[str], data: PretrainingData) -> BertTokenizer:
    """The library numbers single characters within words (`##a`) as its hash tables happen to, and ties go by number.

    So these come first, in order, given as if they were special tokens.
    """
    base = BertTokenizer(do_lower_case=data.lowercase)
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    written = set(base.backend_tokenizer.normalizer.normalize_str("".join(sorted(characters))))
    split = base.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    within = [f"##{one}" for one in sorted(written) if split(f"a{one}")[0][0] == f"a{one}"]
    trained = base.train_new_from_iterator(texts, data.vocab_size, new_special_tokens=within, show_progress=True)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=data.lowercase)


def stored(tokenizer: PreTrainedTokenizerBase, cache_dir: str | None) -> str:
    """The cache's folder of this very tokenizer: prepared corpora are found again by its name, so it names the content.

    The tokenizer's own name does not: a folder may hold another one later, and a Hub name has many revisions.
    """
    with tempfile.TemporaryDirectory() as written:
        tokenizer.save_pretrained(written)
        content = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(written).iterdir()}
        folder = cache_folder(cache_dir) / f"tokenizer-{checksum(content)}"

        def write(beside: Path, damaged: Path | None) -> None:
            shutil.copytree(written, beside, dirs_exist_ok=True)

        made_once(folder, write)
    return str(folder)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """An existing tokenizer by name or folder.

    Raises:
        ValueError: it has no [CLS] or [SEP] (or RoBERTa's <s>, </s>), so it cannot mark rows and documents.
        ValueError: the folder is damaged, or needs code of its own.
        ConnectionError: a Hub name that cannot be reached.
    """
    checksums.check(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # damaged files set off anything: the library tokenizers raises bare Exceptions
        if Path(name).is_dir() or not isinstance(error, OSError):
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer {name!r} cannot be loaded: {reason[:400]}") from error
        raise ConnectionError(
            f"the tokenizer {name!r} is neither a local folder nor reachable on the Hub. Set data.tokenizer to a "
            "folder, or leave it out to train one from the corpus."
        ) from error
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no cls_token and sep_token; BERT's and RoBERTa's kinds do.")
    return tokenizer


class Cutter:
    """A tokenizer that says how many tokens each row lost by being cut to `max_length` (None: none is cut).

    Args:
        stride: cut rows into pieces instead, each of which shares so many tokens with the one before.

    Raises:
        ValueError: there is no such piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, stride: int | None = None):
        self.tokenizer, self.max_length, self.stride = tokenizer, max_length, stride
        if stride is None:
            return
        if max_length is None:
            raise ValueError("data.stride needs data.max_length, the tokens of a piece: the checkpoint names no limit.")
        if not tokenizer.is_fast:
            raise ValueError("data.stride needs a fast tokenizer; this is none. Convert it.")
        room = max_length - tokenizer.num_special_tokens_to_add()
        if stride >= room:
            raise ValueError(
                f"data.stride={stride} leaves nothing new for a piece of max_length={max_length} tokens, {room} of "
                f"them the text's: choose at most {room - 1}."
            )

    def __call__(
        self, *texts: list[Any], truncation: str = "longest_first", **more: Any
    ) -> tuple[Any, list[int], list[int]]:
        """Of texts, or of pairs given as two lists.

        Only pairs that are too long are read twice: what is cut off of them stands in no order that could be counted.

        Returns:
            What the tokenizer gives, the tokens lost of each row, and which row each piece is of: without `stride`
            every row is one piece.
        """
        given = {"truncation": truncation, "max_length": self.max_length, **more}
        count = len(texts[0])
        if self.stride is not None:
            cut = self.tokenizer(*texts, **given, stride=self.stride, return_overflowing_tokens=True)
            return cut, [0] * count, cut.pop("overflow_to_sample_mapping")
        if len(texts) == 1 and self.max_length is not None and self.tokenizer.is_fast:
            cut = self.tokenizer(*texts, **given)
            rest = (row.overflowing for row in cut.encodings)
            return cut, [sum(part.special_tokens_mask.count(0) for part in parts) for parts in rest], [*range(count)]
        whole = self.tokenizer(*texts, verbose=False, **more)
        lost = [max(0, len(ids) - (self.max_length or len(ids))) for ids in whole["input_ids"]]
        rows = [row for row, count in enumerate(lost) if count]
        if rows:
            cut = self.tokenizer(*([side[row] for row in rows] for side in texts), **given)
            for place, row in enumerate(rows):
                for name, column in cut.items():
                    whole[name][row] = column[place]
                if whole.encodings is not None:
                    whole.encodings[row] = cut.encodings[place]
        return whole, lost, [*range(count)]


def encode_texts(batch: Batch, cut: Cutter, width: int) -> Encoded:
    encoded, lost, whose = cut(*([batch["text"], batch["pair"]] if "pair" in batch else [batch["text"]]))
    return {**encoded, "label": [batch["label"][row] for row in whose]}, lost, whose


def encode_labels(batch: Batch, cut: Cutter, width: int) -> Encoded:
    """A row's labels as a one or a zero for each of `width` classes."""
    encoded, lost, whose = encode_texts(batch, cut, width)
    return encoded | {"label": [[float(i in row) for i in range(width)] for row in encoded["label"]]}, lost, whose


def encode_words(batch: Batch, cut: Cutter, width: int) -> Encoded:
    """The first token of each word has the word's tag, and no other token has one.

    The words are read as a text, with blanks between them, as a pipeline will read them: byte-level tokenizers have
    other tokens for a word alone. Where pieces overlap a word has its tag in one of them.
    """
    encoded, lost, whose = cut([" ".join(words) for words in batch["text"]])
    labels = [[IGNORE] * len(ids) for ids in encoded["input_ids"]]
    starts = [accumulate((len(word) + 1 for word in words[:-1]), initial=0) for words in batch["text"]]
    pieces: list[list[int]] = [[] for _ in batch["text"]]
    for piece, row in enumerate(whose):
        pieces[row].append(piece)
    for row, tags in enumerate(batch["label"]):
        for start, word, tag in zip(starts[row], batch["text"][row], tags, strict=True):
            places: list[tuple[int, int]] = []
            for place in range(start, start + len(word)):  # a tokenizer may drop a word's first characters
                found = [(piece, encoded.char_to_token(piece, place)) for piece in pieces[row]]
                if places := [(piece, token) for piece, token in found if token is not None]:
                    break
            if places:
                edges = pieces[row][0], pieces[row][-1]
                piece, token = max(places, key=lambda place: _room(place, len(labels[place[0]]), edges))
                labels[piece][token] = tag
    return {**encoded, "labels": labels}, lost, whose


def _room(place: tuple[int, int], length: int, edges: tuple[int, int]) -> float:
    """How many tokens stand before or behind a token of a piece, whichever are fewer.

    Args:
        place: the piece and the token in it.
        length: tokens of the piece.
        edges: the row's first and last piece, whose outer ends cut nothing off.
    """
    piece, token = place
    return min(token if piece > edges[0] else math.inf, length - 1 - token if piece < edges[1] else math.inf)


def encode_questions(batch: Batch, cut: Cutter, width: int) -> Encoded:
    """Places of the answer's first and last token, or of the first token of all where the context has no answer.

    `spans` are the characters of the context that each token stands for; (-1, -1) of the other tokens.
    """
    if cut.stride is not None:
        _check_room(batch["text"], cut)
    try:
        encoded, lost, whose = cut(batch["text"], batch["pair"], truncation="only_second", return_offsets_mapping=True)
    except Exception as error:  # tokenizers has no other kind
        if "Truncation" not in str(error):
            raise
        longest = max(batch["text"], key=len)
        raise ValueError(
            f"max_length={cut.max_length} leaves no room for a context behind the question {longest[:60]!r}. Raise it, "
            "or shorten the question."
        ) from error
    columns: dict[str, Any] = {"start_positions": [], "end_positions": [], "spans": []}
    offsets = encoded.pop("offset_mapping")
    beyond = BEYOND if cut.stride is None else 0  # another piece holds the answer: this one has none
    for i, answers in enumerate(batch["label"][row] for row in whose):
        places: list[int | None] = [0, 0]
        if answers["text"]:
            text, start = answers["text"][0], answers["answer_start"][0]
            ends = (start, start + len(text.rstrip()) - 1)
            places = [encoded.char_to_token(i, place, sequence_index=1) for place in ends]
            places = [beyond, beyond] if None in places else places
        columns["start_positions"].append(places[0])
        columns["end_positions"].append(places[1])
        sides = zip(offsets[i], encoded.sequence_ids(i), strict=True)
        columns["spans"].append([list(span) if side == 1 else [-1, -1] for span, side in sides])
    return {**encoded, **columns}, lost, whose


def _check_room(questions: list[str], cut: Cutter) -> None:
    """Raise a ValueError where pieces would hold nothing new behind a question: tokenizers ends in a panic there."""
    assert cut.max_length is not None
    assert cut.stride is not None
    asked = cut.tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(range(len(asked)), key=lambda row: len(asked[row]))
    room = cut.max_length - cut.tokenizer.num_special_tokens_to_add(pair=True) - len(asked[longest])
    if room <= cut.stride:
        raise ValueError(
            f"max_length={cut.max_length} leaves {max(0, room)} tokens of a context behind the question "
            f"{questions[longest][:60]!r}, and pieces share data.stride={cut.stride}. Lower the stride, raise "
            "max_length, or shorten the question."
        )


def encode_choices(batch: Batch, cut: Cutter, width: int) -> Encoded:
    """Each choice behind the text. Where a row has fewer than `width`, the rest are choices without a token."""
    counts = [len(choices) for choices in batch["pair"]]
    texts = [text for text, count in zip(batch["text"], counts, strict=True) for _ in range(count)]
    encoded, lost, _ = cut(texts, [choice for choices in batch["pair"] for choice in choices])
    rows = [slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
    columns = {
        name: [column[row] + [[]] * (width - (row.stop - row.start)) for row in rows]
        for name, column in encoded.items()
    }
    return {**columns, "label": batch["label"]}, [sum(lost[row]) for row in rows], [*range(len(rows))]


def encode_pairs(batch: Batch, cut: Cutter, width: int) -> Encoded:
    """The texts as they are: sentence-transformers tokenises them itself."""
    lost = [cut(texts)[1] for name, texts in batch.items() if name != "label"]
    sums = [sum(row) for row in zip(*lost, strict=True)]
    return dict(batch), sums, [*range(len(sums))]
