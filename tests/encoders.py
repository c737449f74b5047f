"""The official fairseq Linformer, written from its formulae, its checkpoints; tiny encoders of every source family."""

import collections
import sys
import types
import typing
from argparse import Namespace
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from linformer_hf.conversion.key_tables import FAMILIES


N, C, HEADS, LAYERS, VOCABULARY = 12, 16, 2, 2, 410  # the larger of the two tokenizers has 400 tokens
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PADDING = dict.fromkeys(FAMILIES, 0) | {"roberta": 1, "xlm-roberta": 5, "camembert": 1, "data2vec-text": 1}
# type_vocab_size
TYPES = dict.fromkeys(FAMILIES, 2) | {"xlm-roberta": 1, "camembert": 1, "data2vec-text": 1, "distilbert": None}
WORDPIECE = ("bert", "distilbert", "electra", "ernie")
KINDS = {kind: "wordpiece" if kind in WORDPIECE else "byte_level_bpe" for kind in FAMILIES}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Normal numbers everywhere, around 1 in the weights of LayerNorm; the rows of padding are no exception."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + noise if norm else noise)
    return model.eval()


def settings(kind: str) -> dict:
    """A source's configuration: no value is the default of ours, where it matters."""
    family, _ = FAMILIES[kind]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": C,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 24,
    }
    fields = {family.config[ours]: value for ours, value in sizes.items()}
    fields |= {"pad_token_id": PADDING[kind], "max_position_embeddings": N}
    if kind != "distilbert":
        fields |= {"type_vocab_size": TYPES[kind], "layer_norm_eps": 0.03}
    if kind in ("bert", "distilbert", "ernie", "big_bird"):
        fields[family.config["hidden_act"]] = "relu"
    if kind == "electra":
        fields |= {"embedding_size": C, "summary_activation": "tanh"}  # its other heads have gelu
    if kind == "ernie":
        fields |= {"use_task_id": True}
    if family.padding_first:
        fields["max_position_embeddings"] += PADDING[kind] + 1
    return fields


def build(kind: str, head: str = "Model", **fields) -> nn.Module:
    title, without_pooler = FAMILIES[kind][1], head == "Model without pooler"
    config = AutoConfig.for_model(kind, **settings(kind) | fields)
    arguments = {"add_pooling_layer": False} if without_pooler else {}
    return randomize(getattr(transformers, title + head.partition(" ")[0])(config, **arguments))


# The official Linformer of fairseq, examples/linformer


class OfficialAttention(nn.Module):
    """The input is compressed first and projected second, bias last; the first l columns serve l tokens."""

    def __init__(self, k: int, shared_kv: bool, shared: nn.Linear | None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))
        self.compress_k = shared or nn.Linear(N, k, bias=False)
        self.compress_v = None
        if not shared_kv:
            self.compress_v = shared or nn.Linear(N, k, bias=False)

    def forward(self, x):
        e = self.compress_k.weight[:, : x.shape[1]]
        f = e if self.compress_v is None else self.compress_v.weight[:, : x.shape[1]]
        q, key, value = (
            states.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for states in (self.q_proj(x), self.k_proj(e @ x), self.v_proj(f @ x))
        )
        weights = (q @ key.transpose(2, 3) * (C // HEADS) ** -0.5).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))


class OfficialLayer(nn.Module):
    def __init__(self, *attention):
        super().__init__()
        self.self_attn = OfficialAttention(*attention)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(C), nn.LayerNorm(C)  # eps 1e-5, post-norm
        self.fc1, self.fc2 = nn.Linear(C, 24), nn.Linear(24, C)
        self.register_buffer("version", torch.tensor(2))

    def forward(self, x, activation):
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        return self.final_layer_norm(x + self.fc2(activation(self.fc1(x))))


class OfficialLinformer(nn.Module):
    """Unpadded inputs; its modules have the official names. With `head`, a classifier on token 0."""

    activation, pooler_activation = staticmethod(nn.functional.gelu), staticmethod(torch.tanh)

    def __init__(self, shared_kv=False, shared_layer=False, head=None, tied=True, k=3):
        super().__init__()
        inner, self.head = nn.Module(), head
        inner.embed_tokens = nn.Embedding(VOCABULARY, C, padding_idx=1)
        inner.embed_positions = nn.Embedding(N + 2, C, padding_idx=1)
        inner.layernorm_embedding = nn.LayerNorm(C)
        inner.compress_layer = nn.Linear(N, k) if shared_layer else None  # with a bias that nothing uses
        inner.layers = nn.ModuleList(OfficialLayer(k, shared_kv, inner.compress_layer) for _ in range(LAYERS))
        self.encoder = nn.Module()
        self.encoder.sentence_encoder = inner
        self.encoder.register_buffer("version", torch.tensor(2))
        self.encoder.lm_head = lm_head = nn.Module()
        lm_head.dense, lm_head.layer_norm = nn.Linear(C, C), nn.LayerNorm(C)
        lm_head.weight = inner.embed_tokens.weight if tied else nn.Parameter(torch.empty(VOCABULARY, C))
        lm_head.bias = nn.Parameter(torch.empty(VOCABULARY))
        self.classification_heads = nn.ModuleDict()
        if head:
            self.classification_heads[head] = nn.ModuleDict({"dense": nn.Linear(C, C), "out_proj": nn.Linear(C, 3)})
        randomize(self)

    def forward(self, ids):
        inner, lm_head = self.encoder.sentence_encoder, self.encoder.lm_head
        positions = torch.arange(ids.shape[1]) + 2  # counted from the padding token's id + 1 on
        x = inner.layernorm_embedding(inner.embed_tokens(ids) + inner.embed_positions(positions))
        for layer in inner.layers:
            x = layer(x, self.activation)
        if self.head:
            classifier = self.classification_heads[self.head]
            return classifier["out_proj"](self.pooler_activation(classifier["dense"](x[:, 0])))
        x = lm_head.layer_norm(self.activation(lm_head.dense(x)))
        return nn.functional.linear(x, lm_head.weight, lm_head.bias)


ARGUMENTS = {
    "arch": "linformer_roberta_base",
    "encoder_attention_heads": HEADS,
    "activation_fn": "gelu",
    "dropout": 0.2,
    "attention_dropout": 0.3,
    "pooler_dropout": 0.4,
    "max_positions": N,
    "compressed": 4,
}


def omegaconf_settings(monkeypatch) -> object:
    """DictConfig({"model": ARGUMENTS}) as OmegaConf 2.0 to 2.4 pickle it, by stand-ins for its classes."""
    kinds = {
        "dictconfig": ["DictConfig"],
        "listconfig": ["ListConfig"],
        "base": ["ContainerMetadata", "Metadata"],
        "nodes": ["AnyNode"],
    }
    classes = {}
    for module, names in kinds.items():
        path = f"omegaconf.{module}"
        made = {name: type(name, (), {"__module__": path}) for name in names}
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        sys.modules[path].__dict__.update(made)
        classes |= made
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

    def make(kind, metadata, parent, **state):
        made = classes[kind]()
        made._metadata = classes[metadata]()
        made._metadata.__dict__.update(ref_type=typing.Any, object_type=None, optional=True, key=None, flags={})
        made._metadata.__dict__.update(flags_root=False, resolver_cache=collections.defaultdict(dict))
        made.__dict__.update(_parent=parent, **state)
        return made

    def wrap(value, parent):
        if not isinstance(value, dict | list):
            return make("AnyNode", "Metadata", parent, _val=value)
        kind = "DictConfig" if isinstance(value, dict) else "ListConfig"
        made = make(kind, "ContainerMetadata", parent)
        made._metadata.__dict__.update(object_type=type(value), key_type=int if kind == "ListConfig" else typing.Any)
        if kind == "DictConfig":
            made._content = {key: wrap(item, made) for key, item in value.items()}
        else:
            made._content = [wrap(item, made) for item in value]
        return made

    return wrap({"_name": None, "common": {"seed": 1}, "model": {**ARGUMENTS, "betas": [0.9, 0.98]}}, None)


def save_official(model: nn.Module, folder: Path, form: str, monkeypatch) -> str:
    """The checkpoint as fairseq's trainer writes it, with the entries around `model` too."""
    entries = {
        "args": {"args": Namespace(**ARGUMENTS), "cfg": None},
        "cfg with a Namespace": {"args": None, "cfg": {"model": Namespace(**ARGUMENTS), "common": {"seed": 1}}},
        "cfg": {"args": None, "cfg": {"model": ARGUMENTS}},
        "OmegaConf": {"args": None, "cfg": omegaconf_settings(monkeypatch)},
        "old file": {"args": Namespace(**ARGUMENTS)},
    }[form]
    extra = {"extra_state": {"val_loss": 1.5, "metrics": collections.OrderedDict()}, "last_optimizer_state": None}
    path = folder / "checkpoint.pt"
    state = model if isinstance(model, dict) else model.state_dict()
    torch.save({**entries, "model": state, **extra}, path, _use_new_zipfile_serialization=form != "old file")
    for name in [name for name in sys.modules if name.partition(".")[0] == "omegaconf"]:
        monkeypatch.delitem(sys.modules, name)
    return str(path)


def assert_official(ours: nn.Module, official: nn.Module) -> None:
    for length in (N, N - 1, 5, 1):
        ids = torch.randint(2, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, official(ids), **CLOSE)
