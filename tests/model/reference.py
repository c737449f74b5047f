"""The paper in plain loops: one Linformer encoder, one row at a time, one head at a time, one slot at a time.

Written from the formulae (Wang et al. 2020, equation 7 and section 4) and not from the model's code; every test that
says "equals the reference" means this file. It sees the real tokens of a row only, so padding cannot reach it.
Everything is differentiable, so gradients are compared as well as outputs. What the paper does not have (`gated_pool`,
the band of single tokens, the length correction, the dilution) is written here in the same way.

Letters: l real tokens of the row, N = max_position_embeddings, K slots, C hidden size, H heads, D = C / H.

At the end: the table of all projection options and the tiny models that the tests compare with the formulae.
"""

import itertools
import math

import torch

from linformer_hf import LinformerConfig, LinformerModel


def slots_of_windows(config, k: int, length: int) -> list[list[int]]:
    """The tokens of every slot of the pooled types; tokens beyond the windows do not exist, slots may be empty."""
    slots: list[list[int]] = [[] for _ in range(k)]
    for t in range(length):
        if length <= k:
            slot = t
        elif not config.boundary_slots:
            slot = math.floor(t * k / length)
        elif t in (0, length - 1):
            slot = 0 if t == 0 else k - 1
        else:
            slot = 1 + math.floor((t - 1) * (k - 2) / (length - 2))
        slots[slot].append(t)
    return slots


def dilution(config, length: int) -> float:
    """What a slot's logit loses in a row of more tokens than the weights were trained on."""
    trained = config.original_max_position_embeddings
    return 0.0 if trained is None else max(0.0, math.log(length / trained))


def windows_of(config, k: int, length: int) -> list[list[int]] | None:
    """The tokens of each of the slots; None where every slot may hold every token (`linear`, `fixed`)."""
    if config.projection_type in ("linear", "fixed"):
        return None
    if config.projection_type in ("conv", "dense_conv"):
        width = config.max_position_embeddings // k
        return [[t for t in range(s * width, (s + 1) * width) if t < length] for s in range(k)]
    return slots_of_windows(config, k, length)


def compress(config, weight, k: int, which: int, head: int, x):
    """X [l, C] -> the K compressed rows (None where no real token reaches the slot) and their logit biases."""
    length, rows, biases = x.shape[0], [], []
    slots = windows_of(config, k, length)
    if slots is None:
        both = weight[:, head] if config.projection_sharing == "none" else weight  # E and F, or the one E = F
        e = both[min(which, len(both) - 1)]
        # A slot whose weights for every real token are exactly 0 is empty, unless all are.
        reached = [any(matrix[slot, t] != 0 for matrix in both for t in range(length)) for slot in range(k)]
        for slot in range(k):
            live = reached[slot] or not any(reached)
            rows.append(sum(e[slot, t] * x[t] for t in range(length)) if live else None)
        return rows, [0.0] * k
    kernel = None if weight is None else weight[min(which, len(weight) - 1)]
    for slot, tokens in enumerate(slots):
        if not tokens:
            rows.append(None)
        elif config.projection_type == "conv":
            rows.append(sum(x[t] * kernel[t - tokens[0]] for t in tokens))
        elif config.projection_type == "dense_conv" and config.projection_sharing == "none":
            size = config.hidden_size // config.num_attention_heads
            own = slice(head * size, (head + 1) * size)
            row = torch.zeros_like(x[0])
            row[own] = sum(x[t][own] @ kernel[head, t - tokens[0]] for t in tokens)
            rows.append(row)
        elif config.projection_type == "dense_conv":
            rows.append(sum(x[t] @ kernel[t - tokens[0]] for t in tokens))
        elif config.projection_type == "mean_pool":
            rows.append(sum(x[t] for t in tokens) / len(tokens))
        else:
            rows.append(torch.stack([x[t] for t in tokens]).amax(0))
        ends = config.boundary_slots and slot in (0, k - 1)
        log_count = math.log(len(tokens)) - (0.0 if ends else dilution(config, length)) if tokens else 0.0
        biases.append(log_count if config.log_count_bias else 0.0)
    return rows, biases


def single_tokens(config, k: int, length: int, t: int) -> set[int]:
    """The keys of query t that are single tokens: its own block of w and the two beside it; all in a short row."""
    w = config.local_window
    if length <= k and (w or config.projection_type == "gated_pool"):
        return set(range(length))
    return {u for u in range(length) if w and abs(u // w - t // w) <= 1}


def attention(config, p, name: str, weight, k: int, x):
    """softmax(Q K'^T / sqrt(D) + slot bias) V' with K' = (E X) W_K + b_K and V' = (F X) W_V + b_V: [l, C].

    With a band, K' and V' hold K - 3 w slots, and the single tokens around each query; a window that lies wholly among
    these is left out.
    """
    size, heads, length = config.hidden_size // config.num_attention_heads, [], len(x)
    kernels_on_projections = config.projection_type in ("conv", "dense_conv") and config.projection_sharing == "none"
    slots = k - 3 * config.local_window
    windows = windows_of(config, slots, length)
    for head in range(config.num_attention_heads):
        columns = slice(head * size, (head + 1) * size)  # this head's D of the C channels
        q = x @ p[f"{name}.query.weight"][columns].T + p[f"{name}.query.bias"][columns]  # [l, D]
        short, single = [], []
        for which, part in enumerate(("key", "value")):
            w, b = p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"]
            if kernels_on_projections:  # per-head kernels: they see X W_K, still without the bias
                rows, biases = compress(config, weight, slots, which, head, x @ w.T)
                rows = [None if row is None else row[columns] for row in rows]
            else:
                rows, biases = compress(config, weight, slots, which, head, x)
                rows = [None if row is None else row @ w[columns].T for row in rows]
            short.append([None if row is None else row + b[columns] for row in rows])
            single.append(x @ w[columns].T + b[columns])  # [l, D]
        output = []
        for t in range(length):
            near = single_tokens(config, k, length, t)
            live = [
                slot
                for slot in range(slots)
                if short[0][slot] is not None
                and not (near and (len(near) == length or (windows and near.issuperset(windows[slot]))))
            ]
            logits = [q[t] @ short[0][s] / math.sqrt(size) + biases[s] for s in live]
            logits += [q[t] @ single[0][u] / math.sqrt(size) for u in near]
            seen = [short[1][s] for s in live] + [single[1][u] for u in near]
            output.append(torch.stack(logits).softmax(0) @ torch.stack(seen))
        heads.append(torch.stack(output))  # [l, D]
    return torch.cat(heads, dim=1)


def gated_attention(config, p, name: str, gates, k: int, x):
    """Attention of one query at a time over single tokens and over slots that hold the other ones: [l, C].

    A row of at most K tokens has only single ones. In a longer row these are the tokens of the query's own block of w
    and of the two blocks beside it, and each of the K - 3 w slots keeps what its gates g = G x choose:

        p = softmax(g)    k' = sum p k    v' = sum p v    added to the slot's logits: - sum p log p
    """
    size, w, length = config.hidden_size // config.num_attention_heads, config.local_window, len(x)
    slots = slots_of_windows(config, k - 3 * w, length)
    heads = []
    for head in range(config.num_attention_heads):
        columns = slice(head * size, (head + 1) * size)
        queries, keys, values = (
            x @ p[f"{name}.{part}.weight"][columns].T + p[f"{name}.{part}.bias"][columns]
            for part in ("query", "key", "value")
        )  # [l, D]
        rows = []
        for t, q in enumerate(queries):
            near = single_tokens(config, k, length, t)
            logits, seen = [q @ keys[u] / math.sqrt(size) for u in near], [values[u] for u in near]
            for slot, tokens in enumerate(slots):
                if near.issuperset(tokens):  # all of them are single tokens already
                    continue
                ends = config.boundary_slots and slot in (0, len(slots) - 1)
                share = torch.stack([gates[head] @ x[u] for u in tokens]).softmax(0)
                key = sum(s * keys[u] for s, u in zip(share, tokens, strict=True))
                entropy = -sum(s * s.log() for s in share)
                logits.append(q @ key / math.sqrt(size) + entropy - (0.0 if ends else dilution(config, length)))
                seen.append(sum(s * values[u] for s, u in zip(share, tokens, strict=True)))
            rows.append(torch.stack(logits).softmax(0) @ torch.stack(seen))
        heads.append(torch.stack(rows))  # [l, D]
    return torch.cat(heads, dim=1)


def layer_norm(config, p, name: str, x):
    centred = x - x.mean(1, keepdim=True)
    variance = centred.pow(2).mean(1, keepdim=True)
    return centred / (variance + config.layer_norm_eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def encode_row(config, p, ids, types=None, embeddings=None):
    """Token ids of one row's real tokens [l] -> [embeddings, layer 1, ..., layer L], each [l, C].

    `p` maps the base model's names to tensors (`dict(model.named_parameters())` plus its buffers); `embeddings` [l, C]
    replaces the word embeddings of `ids`.
    """

    def dense(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    words = p["embeddings.word_embeddings.weight"][ids] if embeddings is None else embeddings
    types = torch.zeros(len(words), dtype=torch.long) if types is None else types
    x = words + p["embeddings.position_embeddings.weight"][: len(words)]
    if config.type_vocab_size:
        x = x + p["embeddings.token_type_embeddings.weight"][types]
    states = [layer_norm(config, p, "embeddings.LayerNorm", x)]
    for i in range(config.num_hidden_layers):
        x, name = states[-1], f"encoder.layer.{i}"
        k = config.projected_length if isinstance(config.projected_length, int) else config.projected_length[i]
        layerwise = config.projection_sharing == "layerwise"
        weight = p.get("encoder.projection.weight" if layerwise else f"{name}.attention.self.projection.weight")
        attend = gated_attention if config.projection_type == "gated_pool" else attention
        context = attend(config, p, f"{name}.attention.self", weight, k, x)
        mixed = dense(f"{name}.attention.output.dense", context)
        if config.length_correction:
            mixed = mixed + max(0, 1 - k / len(x)) * dense(f"{name}.attention.output.correction", context)
        x = layer_norm(config, p, f"{name}.attention.output.LayerNorm", x + mixed)
        inner = dense(f"{name}.intermediate.dense", x)
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2  # GELU
        states.append(layer_norm(config, p, f"{name}.output.LayerNorm", x + dense(f"{name}.output.dense", inner)))
    return states


SHARINGS = ("none", "headwise", "key_value", "layerwise")
INITS = ("normal", "xavier", "mean_pool", "offsets")
# K = 3 w + S: the single tokens around a query and at least one slot, or three with slots for the two ends.
BANDS = (
    {"local_window": 1},  # K = 5 as everywhere, so S = 2
    {"local_window": 1, "projected_length": 6, "boundary_slots": True},
    {"local_window": 2, "projected_length": 8},  # the last block of an odd length is half empty
)
LEARNED = ("linear", "fixed", "conv", "dense_conv")
# Every projection with every way of sharing (learned types) or every window option (pooled types), and the extensions.
SHAPES = [
    *({"projection_type": t, "projection_sharing": s} for t, s in itertools.product(LEARNED, SHARINGS)),
    *(
        {"projection_type": t, "log_count_bias": bias, "boundary_slots": boundary}
        for t, bias, boundary in itertools.product(("mean_pool", "max_pool"), (False, True), (False, True))
    ),
    *({"projection_type": "gated_pool", "boundary_slots": boundary} for boundary in (False, True)),
    *({"projection_type": "gated_pool", **band} for band in BANDS),
    {"projection_type": "gated_pool", "projection_init": "normal", **BANDS[1]},
    *({"projection_type": t, **BANDS[2]} for t in ("mean_pool", "max_pool")),
    *(
        {"projection_type": t, "projection_sharing": s, "projection_init": "mean_pool", **BANDS[2]}
        for t, s in itertools.product(LEARNED, ("none", "key_value"))
    ),
    {"projection_type": "mean_pool", "log_count_bias": True, **BANDS[1], "original_max_position_embeddings": 7},
    *({"projection_type": t, "length_correction": True} for t in ("linear", "conv", "mean_pool", "gated_pool")),
    {"projection_type": "gated_pool", **BANDS[2], "length_correction": True},
    {"projection_type": "max_pool", "log_count_bias": True, "original_max_position_embeddings": 7},
    {"projection_type": "gated_pool", "boundary_slots": True, "original_max_position_embeddings": 7},
    {"projection_type": "gated_pool", **BANDS[1], "original_max_position_embeddings": 7},
]
# ... and with every initialisation.
VARIANTS = [
    {**shape, **({"projection_init": start} if start else {})}
    for shape in SHAPES
    for start in (INITS if "projection_sharing" in shape and "projection_init" not in shape else (None,))
    # Heads that share E and F have no starts of their own.
    if (start, shape["projection_type"]) not in (("offsets", "linear"), ("offsets", "fixed"))
    or shape["projection_sharing"] == "none"
]
TYPES = [
    *({"projection_type": t} for t in (*LEARNED, "mean_pool", "max_pool", "gated_pool")),
    {"projection_type": "gated_pool", **BANDS[0]},
    {"projection_type": "dense_conv", **BANDS[0]},
]


def name_of(variant: dict) -> str:
    """A test id: the values that are set, `linear-headwise-xavier`, `gated_pool-local_window=1-boundary_slots`."""
    words = {key: f"{key}={value}" if type(value) is int else str(value) for key, value in variant.items()}
    return "-".join(key if variant[key] is True else words[key] for key in variant if variant[key] is not False)


def tiny_config(**overrides) -> LinformerConfig:
    """N = 20, K = 5, two layers and inflated weights: what leaks in one layer is seen through the next one."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
        "projected_length": 5,
        "initializer_range": 0.5,
    }
    return LinformerConfig(**{**sizes, **overrides})


def tiny_model(model_class=LinformerModel, seed: int = 0, **overrides):
    """A model in evaluation mode in which nothing is left at the 0 or 1 it starts from."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**overrides)).eval()
    add_noise(model)
    return model


@torch.no_grad()
def add_noise(model) -> None:
    """Make biases, layer norms, gates and length corrections random, so that none of them can be forgotten."""
    gated = model.config.projection_type == "gated_pool"
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        gates = gated and name.endswith("projection.weight")
        if gates or name.endswith("bias") or "LayerNorm" in name or "correction" in name:
            tensor.add_(0.5 * torch.randn_like(tensor))


def tiny_batch(length: int = 20, seed: int = 0):
    """Ids, token types and masks of 5 rows: full, right-padded, left-padded, with holes, a single real token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (5, length), generator=generator)  # 0 is the padding id: BERT trains no row for it
    types = torch.randint(0, 2, (5, length), generator=generator)
    mask = torch.ones(5, length, dtype=torch.long)
    mask[1, length * 2 // 3 :] = 0
    mask[2, : length * 4 // 5] = 0
    mask[3] = torch.randint(0, 2, (length,), generator=generator)
    mask[4] = 0
    mask[4, length // 2] = 1
    return ids, types, mask
