"""The model on an accelerator: what it gives there is what float64 gives on a CPU. `make gpu` runs this file.

Without CUDA the same tests run on the CPU, so that they cannot rot between two machines that have it.
"""

import copy
import warnings

import pytest
import torch
from reference import add_noise
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import linformer_hf
from linformer_hf import (
    LinformerConfig,
    LinformerModel,
    attention_linformer,
    projection_linformer,
    tokens_linformer,
)


pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="this machine has no CUDA device")
KINDS = {
    "linear": {"projection_type": "linear"},
    "linear per head": {"projection_type": "linear", "projection_sharing": "none"},
    "fixed": {"projection_type": "fixed", "projection_sharing": "headwise"},
    "conv": {"projection_type": "conv", "projection_sharing": "key_value"},
    "conv per head": {"projection_type": "conv", "projection_sharing": "none"},
    "dense conv": {"projection_type": "dense_conv", "projection_sharing": "headwise"},
    "dense conv per head": {"projection_type": "dense_conv", "projection_sharing": "none"},
    "mean": {"projection_type": "mean_pool", "log_count_bias": True},
    "max": {"projection_type": "max_pool", "boundary_slots": True},
    "gated": {"projection_type": "gated_pool"},
    "band": {"projection_type": "gated_pool", "local_window": 8, "boundary_slots": True, "length_correction": True},
}
# Relative error (norms) that rounding explains, with float64 as the truth.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
N, ROWS = 128, 4
HEADS = {
    "MaskedLM": lambda ids: {"labels": ids},
    "SequenceClassification": lambda ids: {"labels": ids[:, 0] % 2},
    "TokenClassification": lambda ids: {"labels": ids % 2},
    "QuestionAnswering": lambda ids: {"start_positions": ids[:, 0] % 9, "end_positions": ids[:, 1] % 9},
    "MultipleChoice": lambda ids: {"labels": ids[:1, 0] % 4},
}


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32, whose products have 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def build(kind: str, head: str = "Model", **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 90,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": N,
        "projected_length": 32,
    }
    name = head if head == "Model" else f"For{head}"
    model = getattr(linformer_hf, f"Linformer{name}")(LinformerConfig(**{**sizes, **KINDS[kind], **changes})).eval()
    add_noise(model)
    return model


def batch(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 90, (ROWS, N), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([N, 100, 40, 7])[:, None]
    masks = {
        "right": torch.arange(N) < lengths,
        "left": torch.arange(N) >= N - lengths,
        "holes": torch.rand(ROWS, N, generator=torch.Generator().manual_seed(2)) < 0.7,
    }
    return {"input_ids": ids, **({"attention_mask": masks[padding].long()} if padding in masks else {})}


def states(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    output = model(**{name: tensor.to(device) for name, tensor in given.items()}).last_hidden_state
    mask = given.get("attention_mask")
    return output if mask is None else output[mask.to(device) != 0]


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.detach().cpu().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_float64_on_a_cpu(kind, dtype, attention):
    model = build(kind).to(dtype)
    truth = copy.deepcopy(model).double()
    truth.set_attn_implementation("eager")
    model.set_attn_implementation(attention)
    model.to(DEVICE)
    for padding in ("none", "right", "left", "holes"):
        given = batch(padding)
        with torch.no_grad():
            assert error(states(model, given), states(truth, given)) < TOLERANCE[dtype], padding


@pytest.mark.parametrize("checkpointing", [False, True], ids=("", "checkpointing"))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_float64_on_a_cpu(kind, checkpointing):
    found = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        model = build(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device, dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = states(model, batch("holes"))
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (output * target.to(output)).sum().backward()
        used = [p.grad.flatten().cpu() for name, p in model.named_parameters() if "pooler" not in name]
        found.append(torch.cat(used).double())
    truth, gradient = found
    assert error(gradient, truth) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["linear", "conv", "mean", "band"])
def test_every_head_trains_under_autocast(kind, head, dtype):
    model = build(kind, head).to(DEVICE).train()
    given = {**batch("right"), **HEADS[head](batch("right")["input_ids"])}
    if head == "MultipleChoice":
        given = {name: tensor[None] if tensor.dim() == 2 else tensor for name, tensor in given.items()}
    with torch.autocast(DEVICE, dtype):
        loss = model(**{name: tensor.to(DEVICE) for name, tensor in given.items()}).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_model_on_the_device_can_be_made_longer():
    for kind in ("linear", "band"):
        model, truth = build(kind).to(DEVICE), build(kind)
        for each in (model, truth):
            each.resize_position_embeddings(2 * N)
        given = {"input_ids": batch("none")["input_ids"].repeat(1, 2)}
        with torch.no_grad():
            assert error(states(model, given), states(truth, given).double()) < 1e-4


def test_trainer_trains_on_the_device(tmp_path):
    model = build("band", "SequenceClassification")
    given = batch("right")
    rows = [
        {**{name: tensor[i % ROWS] for name, tensor in given.items()}, "labels": torch.tensor(i % 2)} for i in range(16)
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, bf16=True, use_cpu=DEVICE == "cpu", report_to=[]
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.train().training_loss > 0
    assert next(model.parameters()).device.type == DEVICE
    trainer.save_model(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    row = {name: tensor[:1] for name, tensor in given.items()}
    with torch.no_grad():
        found = model.eval()(**{name: tensor.to(DEVICE) for name, tensor in row.items()}).logits
        assert error(found, again(**row).logits.double()) < TOLERANCE[torch.bfloat16]  # Trainer left autocast on


class NoReads(TorchDispatchMode):
    """Raises where an operation brings a number, or a size that hangs on numbers, back to the host."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not masked, func
        assert func.overloadpacket.__name__ not in self.READS, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True], ids=("inference", "training"))
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_where_the_device_is_not_the_cpu(kind, training, monkeypatch):
    """`test_nothing_waits_for_the_device` for machines without one: the CPU is said to be unreadable."""
    for module in (attention_linformer, projection_linformer, tokens_linformer):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    monkeypatch.setattr(LinformerModel, "_packs", lambda *given: False)
    for head, labels in {"Model": lambda ids: {}, **HEADS}.items():
        model = build(kind, head, **({"projection_init": "mean_pool"} if "linear" in kind else {})).train(training)
        for padding in ("none", "left"):
            given = {**batch(padding), **labels(batch(padding)["input_ids"])}
            if head == "MultipleChoice":
                given = {name: tensor[None] if tensor.dim() == 2 else tensor for name, tensor in given.items()}
            with torch.set_grad_enabled(training), NoReads():
                output = model(**given)
                if training:
                    (output.last_hidden_state.sum() if head == "Model" else output.loss).backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        bool(torch.ones(1).any())


def flat(device: str) -> dict:
    """The real tokens of `batch("right")` as one row, and what tells its documents without a read."""
    rows = batch("right")
    real = rows["attention_mask"].bool()
    bounds = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    given = {"input_ids": rows["input_ids"][real][None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    return {**{name: tensor.to(device) for name, tensor in given.items()}, "max_length_q": N, "max_length_k": N}


@pytest.mark.parametrize("kind", KINDS)
def test_the_documents_of_a_flat_row_are_told_without_a_read(kind, monkeypatch):
    model, given = build(kind).to(DEVICE), flat(DEVICE)
    with torch.no_grad():
        found = model(**given).last_hidden_state[0]
        assert error(found, states(build(kind).double(), batch("right"))) < TOLERANCE[torch.float32]
    for module in (attention_linformer, projection_linformer, tokens_linformer):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    monkeypatch.setattr(LinformerModel, "_packs", lambda *given: False)
    with NoReads():
        output = model(**given).last_hidden_state
        output.sum().backward()
    torch.testing.assert_close(output[0], found, atol=1e-4, rtol=1e-4)
    if DEVICE == "cpu":  # a device asserts the same, and is of no use afterwards
        bounds = given["cu_seq_lens_q"]
        for wrong in ({"max_length_q": N - 1}, {"cu_seq_lens_q": bounds[:-1]}, {"cu_seq_lens_q": 2 * bounds}):
            with pytest.raises(IndexError):
                model(**{**given, **wrong})


@ON_CUDA
@pytest.mark.parametrize("training", [False, True], ids=("inference", "training"))
@pytest.mark.parametrize("padding", ["none", "right", "left", "flat"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind, padding, training):
    """A step that reads a number back stalls the queue; torch raises where one does."""
    model = build(kind).to(DEVICE).train(training)
    given = flat(DEVICE) if padding == "flat" else {name: x.to(DEVICE) for name, x in batch(padding).items()}
    for waiting in ("default", "error"):  # the first call loads kernels, which waits
        torch.cuda.set_sync_debug_mode(waiting)
        try:
            with torch.set_grad_enabled(training):
                output = model(**given).last_hidden_state
                if training:
                    output.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@ON_CUDA
@pytest.mark.parametrize("kind", ["linear", "band"])
def test_a_compiled_model_gives_the_same(kind):
    model = build(kind).to(DEVICE)
    compiled = torch.compile(copy.deepcopy(model), dynamic=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in (N, 90, 50):
            given = {name: tensor[:, :length].to(DEVICE) for name, tensor in batch("right").items()}
            truth = model(**given).last_hidden_state
            assert error(compiled(**given).last_hidden_state, truth.cpu().double()) < 1e-4


def test_base_size_on_the_device_is_what_float32_gives_on_a_cpu():
    """One layer of the default size, as it is used: bfloat16, sdpa, 512 tokens."""
    config = LinformerConfig(vocab_size=100, num_hidden_layers=1)
    torch.manual_seed(0)
    model = LinformerModel(config).eval()
    ids = torch.randint(1, 100, (2, 512), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = model(ids).last_hidden_state.double()
        found = model.to(DEVICE, torch.bfloat16)(ids.to(DEVICE)).last_hidden_state
    assert error(found, truth) < 2e-2
