"""transformers' own example scripts on our checkpoints: the commands of docs/guides/example-scripts.md.

PyPI has no package with these scripts, so they are read from where TRANSFORMERS_EXAMPLES says.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import tiny_model
from transformers import AutoTokenizer

import linformer_hf
from helpers import BLOCKER, ROOT, blocks, commands


EXAMPLES = os.environ.get("TRANSFORMERS_EXAMPLES")
PAGE = ROOT / "docs" / "guides" / "example-scripts.md"
COMMANDS = {Path(words[1]).name: words for (words,) in (found.values for found in commands()) if words[0] == "python"}
HEADS = {
    "run_mlm.py": linformer_hf.LinformerForMaskedLM,
    "run_glue.py": linformer_hf.LinformerForSequenceClassification,
    "run_classification.py": linformer_hf.LinformerForSequenceClassification,
}
# Stands in for `evaluate.load("accuracy")`, which would fetch a script from the Hub.
METRIC = """
import datasets
import evaluate

class Accuracy(evaluate.Metric):
    def _info(self):
        column = datasets.Value("int64")
        features = datasets.Features({"predictions": column, "references": column})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""

pytestmark = pytest.mark.skipif(
    EXAMPLES is None, reason="TRANSFORMERS_EXAMPLES names no checkout of transformers' examples; PyPI has none"
)


@pytest.fixture
def workplace(tokenizers, texts, tmp_path):
    """runs/mine, train.txt, train.csv and the scripts, as the page names them."""
    tokenizer = tokenizers["wordpiece"]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "projected_length": 16}
    tiny_model(linformer_hf.LinformerForMaskedLM, **sizes).save_pretrained(tmp_path / "runs" / "mine")
    tokenizer.save_pretrained(tmp_path / "runs" / "mine")
    for name, file in zip(("train", "test"), sorted(texts.iterdir()), strict=False):
        sentences = file.read_text(encoding="utf-8").split(".")[:40]
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as out:
            rows = ((" ".join(sentence.split()), i % 2) for i, sentence in enumerate(sentences))
            csv.writer(out).writerows([("text", "label"), *(row for row in rows if row[0])])
    (tmp_path / "examples").symlink_to(Path(EXAMPLES).expanduser().resolve())
    return tmp_path


@pytest.mark.parametrize("name", HEADS)
def test_script_trains_evaluates_and_leaves_a_checkpoint(name, workplace):
    alone = name != "run_classification.py"  # the other two must not need this package
    (workplace / "accuracy").mkdir()
    documented = "".join(text for _, _, text in blocks(PAGE, "python"))
    (workplace / "accuracy" / "accuracy.py").write_text(METRIC if alone else documented, encoding="utf-8")
    environment = dict(os.environ, HF_MODULES_CACHE=str(workplace / "modules"))
    if alone:
        (workplace / "site").mkdir()
        blocked = f"import sys\n{BLOCKER}\nsys.meta_path.insert(0, Blocker)\n"
        (workplace / "site" / "sitecustomize.py").write_text(blocked, encoding="utf-8")
        environment["PYTHONPATH"] = str(workplace / "site")
    quick = ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "4"]
    command = [sys.executable, *COMMANDS[name][1:], *quick]
    ran = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    output = workplace / command[command.index("--output_dir") + 1]
    results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    assert 0 < results["train_loss"] < 20
    assert 0 <= results["eval_accuracy"] <= 1
    assert (output / "modeling_linformer.py").exists()
    shutil.rmtree(workplace / "modules", ignore_errors=True)
    model = HEADS[name].from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    with torch.no_grad():
        logits = model(**tokenizer("the old keeper", return_tensors="pt")).logits
    assert logits.isfinite().all()
    before = HEADS[name].from_pretrained(workplace / "runs" / "mine").base_model.state_dict()
    assert any(not torch.equal(before[key], value) for key, value in model.base_model.state_dict().items())
