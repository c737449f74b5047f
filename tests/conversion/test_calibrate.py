"""Closed-form calibration: the formulae, what it gains, and that inputs of at most K tokens stay as they are."""

import pytest
import torch

from linformer_hf.conversion.calibrate import SHARPNESS, calibrate, mean_query_gates, ridge
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.shorten import exact_twin
from linformer_hf.tokens_linformer import RealTokens


N, K = 48, 12
LENGTHS = (N, 30)  # in one calibration
PROJECTIONS = {
    "band": {},
    "gated_pool": {"local_window": 0},
    "mean_pool": {"projection_type": "mean_pool"},
    "linear": {"projection_type": "linear"},
}


@pytest.fixture(scope="module")
def source(tiny_source):
    return read_source(str(tiny_source()))


def rows(source, seed: int, count: int = 60, length: int = N) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(5, source.config["vocab_size"], (count, length), generator=generator))


@torch.no_grad()
def error(student, twin, given: list[torch.Tensor]) -> float:
    ids = torch.stack(given)
    ours, theirs = (model(ids).last_hidden_state for model in (student, twin))
    return float((ours - theirs).norm() / theirs.norm())


def test_ridge_is_the_regularised_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    extra = (0.3 * gram.diagonal().mean()).sqrt() * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([x, extra]), torch.cat([y, torch.zeros(4, 3, dtype=torch.float64)])
    ).solution
    torch.testing.assert_close(ridge(gram, x.T @ y, 0.3), expected)


@torch.no_grad()
def test_gates_score_a_token_as_the_mean_query_does(source):
    layer = convert_model(source, projected_length=K).encoder.layer[0]
    states = torch.randn(30, 24, generator=torch.Generator().manual_seed(0))
    mean_query_gates(layer, states.mean(0))
    attention = layer.attention.self
    for head in range(2):
        part = slice(12 * head, 12 * head + 12)
        query = attention.query(states)[:, part].mean(0)
        keys = attention.key(states)[:, part] - attention.key.bias[part]  # the bias is the same for every token
        expected = keys @ query / 12**0.5
        torch.testing.assert_close(states @ attention.projection.weight[head], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("longer", [False, True])
def test_slots_are_nearly_single_tokens_where_rows_are_longer_than_the_source_reads(source, longer):
    length, given = (2 * N, rows(source, 1, 8, 2 * N)) if longer else (N, rows(source, 1, 8))
    model = convert_model(source, length, rows=given, projected_length=K)
    states = model.embeddings(torch.stack(given), None, None, None, RealTokens.from_mask(None, length, "cpu"))
    layer = model.encoder.layer[0]
    found = layer.attention.self.projection.weight.clone()
    mean_query_gates(layer, states.flatten(0, 1).mean(0))
    expected = layer.attention.self.projection.weight * (SHARPNESS if longer else 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "projection",
    PROJECTIONS.values(),
    ids=PROJECTIONS,
)
def test_it_lowers_the_error_on_rows_that_it_has_not_seen(source, projection):
    twin = exact_twin(source, N, "repeat")
    before = convert_model(source, projected_length=K, **projection)
    after = convert_model(source, rows=rows(source, 1, 200), twin=twin, projected_length=K, **projection)
    unseen = rows(source, 2)
    assert error(after, twin, unseen) < 0.95 * error(before, twin, unseen)


def test_it_returns_the_error_of_every_layer(source):
    twin, student = exact_twin(source, N, "repeat"), convert_model(source, projected_length=K, length_correction=True)
    given = rows(source, 1)
    errors = calibrate(twin, student, given)
    assert len(errors) == 2
    assert errors[-1] == pytest.approx(error(student, twin, given), rel=1e-3)


@torch.no_grad()
def test_gates_and_correction_of_the_first_layer_are_the_formulae(source):
    """Written out with all rows in one matrix, in float64."""
    given = [row for length in LENGTHS for row in rows(source, length, 20, length)]
    student = convert_model(source, rows=given, projected_length=K, local_window=0)
    attention = student.encoder.layer[0].attention
    embedded = [source.reference.embeddings(row[None])[0] for row in given]
    mean_query = attention.self.query(torch.cat(embedded)).mean(0)
    for head in range(2):
        part = slice(12 * head, 12 * head + 12)
        expected = mean_query[part] @ attention.self.key.weight[part] / 12**0.5
        torch.testing.assert_close(attention.self.projection.weight[head], expected, rtol=1e-4, atol=1e-5)
    exact = exact_twin(source, N, "repeat").encoder.layer[0].attention
    features, missing = [], []
    for states in embedded:
        tokens = RealTokens.from_mask(None, len(states), states.device)
        ours, theirs = (part.self(states[None], tokens)[0][0] for part in (attention, exact))
        share = 1 - K / len(states)
        features.append(share * torch.nn.functional.pad(ours, (0, 1), value=1.0).double())
        missing.append((exact.output.dense(theirs) - attention.output.dense(ours)).double())
    a, b = torch.cat(features), torch.cat(missing)
    strength = (0.3 * a.square().sum(0).mean()).sqrt()
    a = torch.cat([a, strength * torch.eye(25, dtype=torch.float64)])
    solved = torch.linalg.lstsq(a, torch.cat([b, b.new_zeros(25, 24)])).solution.float()
    correction = attention.output.correction
    torch.testing.assert_close(correction.weight, solved[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(correction.bias, solved[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("projection", PROJECTIONS.values(), ids=PROJECTIONS)
def test_it_lowers_the_error_of_every_layer_on_its_own_rows(source, projection):
    twin, ids = exact_twin(source, N, "repeat"), torch.stack(rows(source, 1, 200))
    before = convert_model(source, projected_length=K, **projection)
    after = convert_model(source, rows=list(ids), twin=twin, projected_length=K, **projection)
    with torch.no_grad():
        goal, first, second = (model(ids, output_hidden_states=True).hidden_states for model in (twin, before, after))
    for exact, uncalibrated, calibrated in zip(goal[1:], first[1:], second[1:], strict=True):
        assert (calibrated - exact).norm() < 0.98 * (uncalibrated - exact).norm()


def test_a_layer_whose_k_no_row_exceeds_is_left_alone(source):
    student = convert_model(source, rows=rows(source, 1, length=30), projected_length=[K, 30], local_window=0)
    first, second = (layer.attention.output.correction for layer in student.encoder.layer)
    assert first.weight.abs().max() > 1e-3
    assert not second.weight.any()
    assert not second.bias.any()


def test_the_source_and_its_twin_are_not_changed(source):
    twin = exact_twin(source, N, "repeat")
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    student = convert_model(source, rows=rows(source, 1), twin=twin, projected_length=K)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    for name, value in student.state_dict().items():
        assert ".projection." in name or ".correction." in name or torch.equal(value, before[name])


def test_rows_of_at_most_k_tokens_stay_the_sources_also_beside_longer_ones(source):
    student = convert_model(source, rows=rows(source, 1), projected_length=K)
    assert student.encoder.layer[0].attention.output.correction.weight.abs().max() > 1e-3
    ids = torch.stack(rows(source, 3, 3))
    mask = (torch.arange(N) < torch.tensor([K, 5, N])[:, None]).long()
    with torch.no_grad():
        ours = student(ids, attention_mask=mask).last_hidden_state
        theirs = source.reference(ids, attention_mask=mask).last_hidden_state
    for row, length in ((0, K), (1, 5)):
        torch.testing.assert_close(ours[row, :length], theirs[row, :length], rtol=1e-5, atol=1e-5)
    assert (ours[2] - theirs[2]).abs().max() > 1e-2


def test_nothing_to_calibrate_is_refused(source):
    with pytest.raises(ValueError, match="length_correction=True"):
        convert_model(
            source, rows=rows(source, 1), projected_length=K, projection_type="mean_pool", length_correction=False
        )


def test_rows_up_to_k_teach_nothing_and_are_refused(source):
    with pytest.raises(ValueError, match=r"longer than projected_length=12"):
        convert_model(source, rows=rows(source, 1, length=K), projected_length=K)
