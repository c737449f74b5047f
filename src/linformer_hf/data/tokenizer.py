"""Tokenizers: trained on the documents, stored under their content, loaded."""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterable
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


logger = logging.getLogger(__name__)


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
    """A tokenizer that says how many tokens each row lost by being cut to `max_length` (None: none is cut)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, *texts: list[Any], truncation: str = "longest_first", **more: Any) -> tuple[Any, list[int]]:
        """Of texts, or of pairs given as two lists: what the tokenizer gives, and the tokens lost of each row.

        Only pairs that are too long are read twice: what is cut off of them stands in no order that could be counted.
        """
        given = {"truncation": truncation, "max_length": self.max_length, **more}
        if len(texts) == 1 and self.max_length is not None and self.tokenizer.is_fast:
            cut = self.tokenizer(*texts, **given)
            rest = (row.overflowing for row in cut.encodings)
            return cut, [sum(part.special_tokens_mask.count(0) for part in parts) for parts in rest]
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
        return whole, lost
