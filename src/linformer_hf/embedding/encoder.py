"""An encoder as it reads documents: one pass gives the states of every token, and these the vectors of any parts.

A vector of a part of a document (a piece, a sentence, a span) is what the folder's pooling makes of the part's own
states, which have seen the whole document: late chunking. The vector of the whole is what `encode_document` of
sentence-transformers gives.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from ..utils.files import loading


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Item = TypeVar("Item")
# What may stand behind the encoder: it computes with the states alone, and each vector from those of its own part.
BEHIND = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first that a folder has, as `encode_document` takes it
SINGLE_TOKEN = ("cls", "lasttoken")  # poolings that read one token, which stands for the whole input
BATCHES_AHEAD, CHARACTERS_PER_TOKEN, MOST_AHEAD = 8, 4, 4096  # documents are sorted by length within so much text
POOLED_TOKENS = 65_536  # so many states, padding included, are pooled at a time
# Where a sentence may end: behind the marks (also Arabic's and Hindi's) and the quotes or brackets closed there, if a
# space follows; behind those of Chinese and Japanese, which need none; at an empty line.
SENTENCE_END = re.compile(
    # The lookbehind: a run of marks is looked at once, not from each of them.
    r"(?P<spaced>(?<![.!?\u2026\u061f\u0964])[.!?\u2026\u061f\u0964]+[\"'\u201d\u2019\u00bb)\]}]*)(?=\s)"
    r"|[\u3002\uff01\uff1f\uff61]+[\u201d\u2019\u300d\u300f\uff09]*"
    r"|(?<=\S)\s*\n[^\S\n]*\n"
)


class Read(NamedTuple):
    """One document as it was read.

    Attributes:
        ids: token ids [n], special tokens and those of a prompt included.
        offsets: [n, 2], the first character of each token in the text and the one behind it; (0, 0) for special tokens
            and those of a prompt.
        states: last hidden states [n, C], float32, on the CPU; none, [0, C], where the text was only `cut`.
        lost: how many tokens were cut off.
    """

    ids: Tensor
    offsets: Tensor
    states: Tensor
    lost: int


class Part(NamedTuple):
    """A part of a document: its number, its tokens `first` to `stop`, its characters `start` to `end`."""

    number: int
    first: int
    stop: int
    start: int
    end: int


class DocumentEncoder:
    """A sentence-transformers folder, or a bare encoder, whose tokens are then averaged.

    Attributes:
        model: in evaluation mode.
        length: N, the most tokens that are read of a document, special ones included.
        prompt: what is put before each document; empty for most folders.
        prompt_length: its tokens, the special ones before it included.
    """

    def __init__(self, model: "SentenceTransformer", max_length: int | None = None, prompt_name: str | None = None):
        self.model = model.eval()
        self.prompt = _prompt(model, prompt_name)
        self._encoder.unpad_inputs = False  # padded rows are what `read` takes apart
        self.prompt_length = self._encoder._get_prompt_length(self.prompt, task="document") if self.prompt else 0
        self.length = self._length(max_length)

    @property
    def _encoder(self) -> Any:
        return self.model[0]

    @property
    def _behind(self) -> list[Any]:
        return list(self.model)[1:]

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: str | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        prompt_name: str | None = None,
        dtype: str = "float32",
    ) -> "DocumentEncoder":
        """Load a folder or a name on the Hub; no code from there is run, and weights are safetensors.

        Args:
            device: by default the accelerator, if there is one.
            max_length: N (default: what the folder says), up to the model's positions.
            prompt_name: one of the folder's prompts; by default the one of its documents, as in `encode_document`.
            dtype: of the weights, `float32` or `bfloat16`.

        Raises:
            ImportError: sentence-transformers is not installed.
            FileNotFoundError: there is no such folder.
            ValueError: it holds no encoder, or one that is not whole; or an option does not fit to it.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                f"vectors need sentence-transformers ({error}): pip install 'linformer_hf[ecosystem]'."
            ) from error
        name, here = str(name), Path(name).is_dir()
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "use_safetensors": True}
        with loading(name):
            if here:
                check_weights(name, trust_remote_code=False, **options)
            model = SentenceTransformer(
                name, device=device, revision=revision, local_files_only=here, model_kwargs=options
            )
            _check_modules(model)
        return cls(model, max_length, prompt_name)

    def read(self, texts: Iterable[str], batch_tokens: int = 8192) -> Iterator[Read]:
        """Documents in the given order, each read in one pass.

        Args:
            batch_tokens: a batch has at most so many tokens with its padding, or one document. Documents of about equal
                length are batched together, within some 8 batches' worth of text.
        """
        most = BATCHES_AHEAD * batch_tokens
        for window in grouped(texts, self.size, most):
            reads: list[Any] = [None] * len(window)
            # The tokenizer pads all that it is given to the longest: one long text among thousands of short ones.
            for rows in _batches([self.size(text) for text in window], most):
                for row, read in zip(rows, self._read([window[row] for row in rows], batch_tokens), strict=True):
                    reads[row] = read
            yield from reads

    def cut(self, text: str) -> Read:
        """A text's tokens, all of them, without a pass and so without states: to find parts that are read alone."""
        found = self._encoder.tokenizer(text, return_offsets_mapping=True, verbose=False)
        offsets = torch.tensor(found["offset_mapping"], dtype=torch.long).view(-1, 2)
        return Read(torch.tensor(found["input_ids"], dtype=torch.long), offsets, torch.empty(0, 0), 0)

    def size(self, text: str) -> int:
        """About how many tokens of a text are read."""
        return min(len(text) // CHARACTERS_PER_TOKEN + 1, self.length)

    @torch.inference_mode()
    def vectors(self, parts: Sequence[Tensor], prompt: int = 0) -> Tensor:
        """Each part [m, C] of states through the folder's modules behind the encoder.

        Args:
            prompt: so many first tokens of each part are a prompt's, which some folders leave out of the pooling.

        Returns:
            Vectors [p, D], float32, on the CPU.
        """
        found: list[Any] = [None] * len(parts)
        for rows in _batches([len(part) for part in parts], POOLED_TOKENS):
            states = pad_sequence([parts[row] for row in rows], batch_first=True)
            mask = pad_sequence([torch.ones(len(parts[row]), dtype=torch.long) for row in rows], batch_first=True)
            features: Any = {
                "token_embeddings": states.to(self.model.device, self.model.dtype),
                "attention_mask": mask.to(self.model.device),
            }
            if prompt:
                features["prompt_length"] = prompt
            for module in self._behind:
                features = module(features)
            for row, vector in zip(rows, features["sentence_embedding"].float().cpu(), strict=True):
                found[row] = vector
        return torch.stack(found)

    def whole(self, read: Read) -> Part:
        """All tokens, special ones included; its characters end where the document was cut."""
        first, stop = _text_tokens(read.offsets)
        start, end = (int(read.offsets[first, 0]), int(read.offsets[stop - 1, 1])) if stop > first else (0, 0)
        return Part(0, 0, len(read.ids), start, end)

    def pieces(self, read: Read, size: int) -> list[Part]:
        """Pieces of `size` tokens one after the other, without the special tokens; the last may be shorter.

        Raises:
            ValueError: `size` is below 1, or the document was read and the folder's pooling has no meaning for a piece.
        """
        self._check_late(read)
        if size < 1:
            raise ValueError(f"pieces have at least 1 token, not {size}.")
        first, stop = _text_tokens(read.offsets)
        ranges = [(begin, min(begin + size, stop)) for begin in range(first, stop, size)]
        return [
            Part(i, begin, end, int(read.offsets[begin, 0]), int(read.offsets[begin:end, 1].max()))
            for i, (begin, end) in enumerate(ranges)
        ]

    def sentences(self, read: Read, text: str) -> list[Part]:
        """The sentences of the text that was read (see `sentence_spans`). Raises as `pieces` does."""
        return self.spans(read, sentence_spans(text))

    def spans(self, read: Read, spans: Sequence[tuple[int, int]]) -> list[Part]:
        """The tokens that overlap each span of characters, first and behind the last.

        A span without a token that was read (blank, or behind the cut) is left out; the others keep their number.
        Raises as `pieces` does.
        """
        self._check_late(read)
        first, stop = _text_tokens(read.offsets)
        starts, ends = (column.cummax(0).values.contiguous() for column in read.offsets[first:stop].unbind(1))
        found = []
        for i, (start, end) in enumerate(spans):
            begin = first + int(torch.searchsorted(ends, start, right=True))
            behind = first + int(torch.searchsorted(starts, end))
            if behind > begin:
                found.append(Part(i, begin, behind, start, min(end, int(ends[behind - first - 1]))))
        return found

    def _check_late(self, read: Read) -> None:
        if len(read.states):
            self.check_parts()

    def check_parts(self) -> None:
        """Raise a ValueError if the folder's pooling has no meaning for a part of a document."""
        for module in self._behind:
            modes = getattr(module, "pooling_mode", ())
            for mode in (modes,) if isinstance(modes, str) else modes:
                if mode in SINGLE_TOKEN:
                    raise ValueError(
                        f"the folder's pooling is {mode!r}: it reads one token that stands for the whole input, and "
                        "pieces, sentences and spans of one pass have none. Take whole documents, read each part by "
                        "itself (--alone), or take a folder that pools by mean or max."
                    )

    def fingerprint(self) -> str:
        """A checksum of all that makes the vectors: weights, modules, tokenizer, prompt and N."""
        summed = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            summed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            summed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        tokenizer = json.loads(self._encoder.tokenizer.backend_tokenizer.to_str())
        config = self._encoder.config.to_dict()
        for content, passing in ((tokenizer, ("truncation", "padding")), (config, ("_name_or_path",))):
            for key in passing:  # how it was called last, and where it lies
                content.pop(key, None)
        modules = [(type(module).__name__, module.get_config_dict()) for module in (self._encoder, *self._behind)]
        facts = [modules, config, tokenizer, self.prompt, self.length]
        summed.update(json.dumps(facts, sort_keys=True, default=str).encode())
        return summed.hexdigest()

    def _length(self, wanted: int | None) -> int:
        positions = positions_of(self._encoder.model)
        tokenizer: Any = self._encoder.tokenizer
        fewest = tokenizer.num_special_tokens_to_add() + self.prompt_length + 1
        if wanted is not None and positions is not None and wanted > positions:
            raise ValueError(
                f"max_length={wanted} is more than the {positions} positions of the model: choose at most {positions}, "
                "or convert it with a larger --max-length."
            )
        limits = [positions, tokenizer.model_max_length, getattr(self._encoder, "document_length", None)]
        length = min(limit for limit in limits if limit is not None) if wanted is None else wanted
        if length < fewest:
            raise ValueError(f"max_length={length} leaves no token of a document: choose at least {fewest}.")
        return length

    @torch.inference_mode()
    def _read(self, texts: list[str], batch_tokens: int) -> list[Read]:
        given = {"max_length": self.length, "truncation": "longest_first", "return_offsets_mapping": True}
        features = self._encoder.preprocess(
            texts, prompt=self.prompt or None, task="document", processing_kwargs={"text": given}
        )
        offsets = (features.pop("offset_mapping") - len(self.prompt)).clamp(min=0)
        kept = features["attention_mask"].bool()  # [B, n]
        reads: list[Any] = [None] * len(texts)
        for rows in _batches(kept.sum(1).tolist(), batch_tokens):
            columns = kept[rows].any(0)
            batch = {
                name: value[rows][:, columns].to(self.model.device) if isinstance(value, Tensor) else value
                for name, value in features.items()
            }
            states = self._encoder(batch)["token_embeddings"].float().cpu()  # [rows, columns, C]
            for row, state in zip(rows, states, strict=True):
                real = kept[row]
                lost = sum(part.special_tokens_mask.count(0) for part in features.encodings[row].overflowing)
                reads[row] = Read(features["input_ids"][row][real], offsets[row][real], state[real[columns]], lost)
        return reads


def blend(vectors: Tensor, others: Tensor) -> Tensor:
    """The direction half way between two vectors, [..., D], and the mean of their lengths."""
    lengths = (vectors.norm(dim=-1, keepdim=True) + others.norm(dim=-1, keepdim=True)) / 2
    return normalize(normalize(vectors, dim=-1) + normalize(others, dim=-1), dim=-1) * lengths


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The characters of each sentence, [start, end), without the space around it.

    A sentence ends behind `.`, `!`, `?` or `…` and the quotes or brackets closed there, where a space and then no
    small letter follows; behind the full-width marks of Chinese and Japanese; and at an empty line. An abbreviation
    before a capital letter ("Dr. Smith") ends one too: the rule knows no words of any language.
    """
    ends = [
        match.end()
        for match in SENTENCE_END.finditer(text)
        if not match["spaced"] or not text[match.end() : match.end() + 100].lstrip()[:1].islower()
    ]
    spans, start = [], 0
    for end in (*ends, len(text)):
        sentence = text[start:end]
        if sentence.strip():
            before = len(sentence) - len(sentence.lstrip())
            spans.append((start + before, start + len(sentence.rstrip())))
        start = end
    return spans


def grouped(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Items one after the other in lists, each ended by the item that makes its size `most`."""
    group: list[Item] = []
    held = 0
    for item in items:
        group.append(item)
        held += size(item)
        if held >= most or len(group) == MOST_AHEAD:
            yield group
            group, held = [], 0
    if group:
        yield group


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of rows of about equal length, at most `tokens` in a batch with its padding, or one row."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _text_tokens(offsets: Tensor) -> tuple[int, int]:
    """The range of the tokens of the text itself, behind a prompt and between special tokens."""
    places = (offsets[:, 1] > offsets[:, 0]).nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _prompt(model: "SentenceTransformer", name: str | None) -> str:
    """The prompt of documents, found as `encode_document` does."""
    if name is not None and name not in model.prompts:
        raise ValueError(f"the folder has no prompt {name!r}; it has {', '.join(model.prompts) or 'none'}.")
    candidates = [name] if name else [*DOCUMENT_PROMPTS, model.default_prompt_name]
    return next((model.prompts[one] or "" for one in candidates if one in model.prompts), "")


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model of transformers has positions for; None where positions are relative."""
    most = getattr(model.config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else None
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            padding = getattr(module, "padding_idx", None)  # RoBERTa and its kin count from behind it
            rows = table.num_embeddings - (padding + 1 if isinstance(padding, int) else 0)
            return min(rows, most or rows)  # Nyströmformer has rows that it never reads
    return most


def _check_modules(model: "SentenceTransformer") -> None:
    names = [type(module).__name__ for module in model]
    encoder: Any = model[0]
    if names[0] != "Transformer" or encoder.module_output_name != "token_embeddings" or "Pooling" not in names:
        raise ValueError(f"it holds no encoder with a pooling behind it, but {', '.join(names)}.")
    if strange := [name for name in names[1:] if name not in BEHIND]:
        raise ValueError(
            f"{', '.join(strange)} behind the encoder cannot be used here; there may be {', '.join(BEHIND)}."
        )
    if encoder.tokenizer is None or not encoder.tokenizer.is_fast or "message" in encoder.modality_config:
        raise ValueError("its tokenizer does not tell where its tokens stand in a text (a fast one does).")


def check_weights(name: str | Path, **options: Any) -> bool:
    """Raise a ValueError for missing weights, which transformers would draw at random, and for pickled ones.

    No weight is read for it, of which there may be gigabytes.

    Args:
        name: a folder or a Hub name.
        options: of `from_pretrained`.

    Returns:
        Whether the pooler's are missing: no vector needs them.
    """
    from transformers import AutoModel

    folder = Path(name)
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else [{"path": ""}]
    for module in modules[1:]:
        place = folder / module["path"]
        if (place / "pytorch_model.bin").exists() and not (place / "model.safetensors").exists():
            raise ValueError(f"{place} has pickled weights only, which are not read: save it again as safetensors.")
    _, found = AutoModel.from_pretrained(
        folder / modules[0]["path"], output_loading_info=True, device_map="meta", **options
    )
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(f"weights are missing: {', '.join(missing[:8])}{' and more' if missing[8:] else ''}.")
    return bool(found["missing_keys"])
