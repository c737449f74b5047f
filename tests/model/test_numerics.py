"""Weights and activations of any size: a Linformer is finite where BERT is, outputs and gradients.

BERT of transformers is the fair limit: with the same weights it overflows too, somewhere (in float16 also with tiny
ones, in LayerNorm). E sums tokens that BERT's attention averages, so K' and V' may be larger than BERT's: a Linformer
is asked where BERT bears weights sixteen times smaller and larger.
"""

import pytest
import torch
from reference import TYPES, name_of, tiny_config, tiny_model
from transformers import BertConfig, BertModel

import torture


MARGIN = 4  # of the exponent
ROWS = 3
SCALES = [-100, *range(-40, 41)] if torture.LONG else [-40, -16, 0, 8, 16]  # exponents of 2
SCALED = {
    "queries and keys": (".query.", ".key."),
    "values": (".value.",),
    "embeddings": ("word_embeddings",),
    "everything": ("query", "key", "value", "dense", "embeddings.weight", "word_embeddings"),
}
SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def bert(**options) -> BertModel:
    config = tiny_config()
    sizes = {name: getattr(config, name) for name in (*SHARED, "max_position_embeddings", "type_vocab_size")}
    return BertModel(BertConfig(**sizes, pad_token_id=config.pad_token_id, **options)).eval()


def inputs(length: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """ids and masks; what Linformer takes and BERT does not, a row without a token, is in test_modeling_linformer."""
    torch.manual_seed(3)
    ids, real = torch.randint(1, 50, (ROWS, length)), torch.ones(ROWS, length, dtype=torch.long)
    ragged = real.clone()
    ragged[0, ::2] = 0
    ragged[1, :-1] = 0
    return {
        "N tokens": (ids, real),
        "one token": (ids[:, :1], real[:, :1]),
        "one token, repeated": (torch.full_like(ids, 7), real),
        "holes, and one real token": (ids, ragged),
    }


def scaled(model, states, names: tuple[str, ...], exponent: int, dtype: torch.dtype):
    """The model with these weights, those with one of the names times 2^exponent, at most half the dtype's largest."""
    limit = torch.finfo(dtype).max / 2
    changed = {
        name: (value.double() * 2.0**exponent).clamp(-limit, limit) if any(n in name for n in names) else value
        for name, value in states.items()
    }
    model.float().load_state_dict(changed, strict=False)
    return model.to(dtype)


def is_finite(model, *batches: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether states and all gradients are, of the sum of the losses; batches that take the same path go together."""
    model.zero_grad()
    tensors, loss, paths = [], torch.zeros(()), {}
    for ids, mask in batches:
        paths.setdefault((ids.shape[1], bool(mask.all())), []).append((ids, mask))
    for alike in paths.values():
        ids, masks = (torch.cat(part) for part in zip(*alike, strict=True))
        tensors.append(model(input_ids=ids, attention_mask=masks).last_hidden_state)
        for states, mask in zip(tensors[-1].split(ROWS), masks.bool().split(ROWS), strict=True):
            loss = loss + states[mask].float().mean()
    loss.backward()
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def not_finite(model, batches: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> set[str]:
    """Names of those of which it does not hold. A sum is finite only if all its parts are: one look may do."""
    if not batches or is_finite(model, *batches.values()):
        return set()
    return {name for name, batch in batches.items() if not is_finite(model, batch)}


@pytest.fixture(scope="module")
def states() -> dict[str, torch.Tensor]:
    """Weights under the names that BERT and Linformer share."""
    torch.manual_seed(5)
    return {
        name: torch.randn_like(value) * 0.3 if value.dim() > 1 else value for name, value in bert().state_dict().items()
    }


@pytest.fixture(scope="module")
def bert_bears(states):
    """Whether BERT is finite for an input with weights of this size, sixteen times smaller and sixteen times larger."""
    seen: dict[tuple, dict[str, bool]] = {}

    def at(dtype, attention, part, exponent) -> dict[str, bool]:
        key = (dtype, attention, part, exponent)
        if key not in seen:
            model = scaled(bert(attn_implementation=attention), states, SCALED[part], exponent, dtype)
            given = inputs(tiny_config().max_position_embeddings)
            seen[key] = dict.fromkeys(given, True) | dict.fromkeys(not_finite(model, given), False)
        return seen[key]

    def bears(dtype, attention, part, exponent, name) -> bool:
        return all(at(dtype, attention, part, exponent + shift)[name] for shift in (-MARGIN, 0, MARGIN))

    return bears


@pytest.mark.torture
@pytest.mark.parametrize("part", SCALED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linformer_is_finite_where_bert_is(dtype, attention, part, states, bert_bears):
    cases, refused = 0, []
    for kind in TYPES:
        model = tiny_model(**kind).eval()
        model.set_attn_implementation(attention)
        own = {**model.state_dict(), **states}
        for exponent in SCALES:
            given = inputs(model.config.max_position_embeddings)
            borne = {name: one for name, one in given.items() if bert_bears(dtype, attention, part, exponent, name)}
            scaled(model, own, SCALED[part], exponent, dtype)
            cases += len(borne)
            refused += [(kind, name, exponent) for name in not_finite(model, borne)]
    assert not refused
    assert cases >= 4 * len(TYPES)  # one scale at least
    torture.record("finite where BERT is", dtype=str(dtype), attention=attention, part=part, cases=cases)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("kind", TYPES, ids=name_of)
def test_logits_beyond_float16_are_no_nan(kind, rate):
    """Queries and keys of 1,000 give logits of about 1e6. torch's kernel has these in float32."""
    model = tiny_model(**kind, num_hidden_layers=1, attention_probs_dropout_prob=rate).half().train(rate > 0)
    model.set_attn_implementation("sdpa")
    for part in ("query", "key"):
        torch.nn.init.constant_(getattr(model.encoder.layer[0].attention.self, part).bias, 1000)
    ids = torch.arange(1, 21)[None]
    states = model(ids).last_hidden_state
    states.float().mean().backward()
    assert states.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
