"""What a source knows of rows that are longer than its own N: windows, as a teacher and as a measure."""

from dataclasses import replace

import pytest
import torch

from linformer_hf.conversion import fidelity
from linformer_hf.conversion.calibrate import calibrate
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.shorten import Windows, exact_twin, extend_positions
from linformer_hf.hub import sentence_head


N = 24


@pytest.fixture(scope="module")
def source(tiny_source):
    return read_source(str(tiny_source("BertForMaskedLM", max_position_embeddings=N)))


@pytest.fixture(scope="module")
def rows(source):
    return torch.randint(5, source.config["vocab_size"], (72, 4 * N), generator=torch.Generator().manual_seed(0))


def test_positions_are_repeated_or_stretched():
    positions = torch.arange(4.0)[:, None]
    assert extend_positions(positions, 9, "repeat")[:, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 1, 2]
    assert extend_positions(positions, 2, "repeat")[:, 0].tolist() == [0, 1]
    assert extend_positions(positions, 9, "repeat", 2)[:, 0].tolist() == [0, 1, 2, 3, 1, 2, 1, 2, 1]
    stretched = extend_positions(positions, 9, "interpolate")[:, 0]
    assert (stretched.diff() >= 0).all()


@pytest.mark.parametrize(("length", "size"), [(20, 8), (17, 16), (33, 4), (100, 16), (4096, 512), (9, 16), (16, 16)])
def test_every_token_is_taken_once_and_from_the_midst_of_a_window(length, size):
    windows, ids = Windows.over(length, size), torch.arange(length)[None].repeat(2, 1)
    split = windows.split(ids)
    assert split.shape[1] == min(length, size)
    assert torch.equal(windows.join(split[..., None])[..., 0], ids)
    assert set(split[:, 0].tolist()) == {0}  # each begins and ends with the row's marks
    assert set(split[:, -1].tolist()) == {length - 1}
    if windows.place is not None:  # but near the row's ends, a quarter of a window lies on either side
        inside = windows.place[size // 2 : -(size // 2)] - 1
        assert all(torch.minimum(inside, size - 3 - inside) >= (size - 2) // 4 - 1)


@torch.no_grad()
def test_beyond_its_own_length_a_source_is_measured_over_windows(source, rows):
    """By hand for the middle of a row; up to N tokens nothing changes."""
    twin, student = exact_twin(source, 4 * N, "repeat"), convert_model(source, 4 * N, projected_length=N)
    measured = fidelity.measure(twin, student, {"text": rows[:12]}, source.tokenizer, source)
    windows = Windows.over(4 * N, N)
    goal = torch.stack(
        [windows.join(twin.base_model(windows.split(row[None])).last_hidden_state)[0] for row in rows[:12]]
    )
    first = twin.base_model(torch.cat([rows[:12, : N - 1], rows[:12, -1:]], 1)).last_hidden_state
    torch.testing.assert_close(goal[:, : N // 2], first[:, : N // 2])
    given = student.base_model(rows[:12]).last_hidden_state
    assert measured["final_error"] == pytest.approx(float((given - goal).norm() / goal.norm()), rel=1e-4)
    cosine = torch.cosine_similarity(given.mean(1), goal.mean(1)).mean()
    assert measured["cosine"] == pytest.approx(float(cosine), rel=1e-4)
    whole = fidelity.measure(twin, student, {"text": rows[:12]}, source.tokenizer)
    assert whole["final_error"] != measured["final_error"]
    assert whole["masked"]["source_perplexity"] != measured["masked"]["source_perplexity"]
    short = {"text": rows[:12, :N]}
    assert fidelity.measure(twin, student, short, source.tokenizer, source)["final_error"] == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_calibrated_on_windows_a_model_is_nearer_to_them(source, rows):
    twin = exact_twin(source, 4 * N, "repeat")
    errors = []
    for read in (None, source):
        student = convert_model(source, 4 * N, projected_length=N, length_correction=True)
        calibrate(twin.base_model, student.base_model, list(rows[:60]), source=read)
        found = fidelity.measure(twin, student, {"text": rows[60:]}, source.tokenizer, source)
        errors.append(found["final_error"])
        assert torch.equal(student.base_model(rows[:, :N])[0], exact(source, rows))
    assert errors[1] < errors[0]


@torch.no_grad()
def test_a_sentence_encoder_goes_on_with_what_it_was_last_trained_to_read(source, rows):
    """Up to the source's N nothing changes; behind it positions and windows are those of its shorter texts."""
    tuned = replace(source, sentence=replace(sentence_head.pooled("mean", source.config["hidden_size"]), length=12))
    assert (source.reach, tuned.reach, replace(tuned, sentence=None).reach) == (N, 12, N)
    for told in (None, 0, 3, N, 4096):
        assert replace(tuned, sentence=replace(tuned.sentence, length=told)).reach == N
    plain, model = convert_model(source, 4 * N), convert_model(tuned, 4 * N)
    before, after = (each.base_model.embeddings.position_embeddings.weight for each in (plain, model))
    assert torch.equal(after[:N], before[:N])
    assert torch.equal(after[N:], before[torch.arange(3 * N) % 10 + 1])
    assert torch.equal(model.base_model(rows[:2, :N])[0], plain.base_model(rows[:2, :N])[0])
    assert Windows.of(tuned, N).index is None
    assert Windows.of(tuned, N + 1).index.shape[1] == 12
    assert Windows.of(None, 4 * N).index is None


def exact(source, rows):
    return convert_model(source, projected_length=N).base_model(rows[:, :N])[0]


@torch.no_grad()
def test_a_longer_model_reads_what_its_source_reads_as_the_source_does(source, rows):
    model = convert_model(source, 4 * N)
    config = model.config
    assert (config.projected_length, config.local_window, config.original_max_position_embeddings) == (N, N // 4, N)
    twin = exact_twin(source, N, "repeat")
    short = rows[:4, :N]
    torch.testing.assert_close(model.base_model(short)[0], twin.base_model(short)[0], atol=1e-6, rtol=1e-6)
    assert convert_model(source, 4 * N, projected_length=12).config.original_max_position_embeddings == N
    for length, options in ((4 * N, {"projected_length": 2 * N}), (4 * N, {"projection_type": "linear"}), (N, {})):
        options = {"projected_length": 12, **options}
        assert convert_model(source, length, **options).config.original_max_position_embeddings is None
