"""`linformer-hf reproduce`: the committed evidence as a page, reuse, failures that stay visible, bad folders."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from linformer_hf import cli
from linformer_hf.paper import reproduce as verb
from linformer_hf.paper.claims import CLAIMS
from linformer_hf.utils.recipe import RecipeError


ROOT = Path(__file__).parents[2]
REPORTS = {"spectrum": "spectrum", "theory": "theory", "benchmark": "benchmark/inference"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like a checkout after `spectrum`, `theory` and `benchmark` have run there."""
    monkeypatch.chdir(tmp_path)
    section: dict = {"output_dir": "out/quick"}
    for name, report in REPORTS.items():
        folder = tmp_path / "runs" / name
        shutil.copytree(ROOT / "reports" / report, folder)
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        content["recipe"][name]["output_dir"] = f"runs/{name}"
        (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(content["recipe"]), encoding="utf-8")
        section[name] = [recipe.name]
    (tmp_path / "configs" / "reproduce").mkdir(parents=True)
    write_scale(section)
    monkeypatch.setattr(verb, "LENGTHS", (16, 32))
    return section


def write_scale(section):
    Path("configs/reproduce/quick.yaml").write_text(yaml.safe_dump({"reproduce": section}), encoding="utf-8")


def test_the_page_has_every_claim_every_figure_and_links_that_lead_somewhere(place, capsys):
    assert cli.main(["reproduce", "--scale", "quick"]) == 0
    assert str(Path("out/quick/report.html").resolve()) in capsys.readouterr().out
    text = Path("out/quick/README.md").read_text(encoding="utf-8")
    page = Path("out/quick/report.html").read_text(encoding="utf-8")
    content = json.loads(Path("out/quick/results.json").read_text(encoding="utf-8"))
    assert [claim["claim"] for claim in content["claims"]] == [claim.words for claim in CLAIMS]
    for claim in content["claims"]:
        assert f"| {claim['claim']} | {claim['place']} | {claim['measured']} |" in text
        assert claim["verdict"] in page
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 8
    for picture in pictures:
        assert (Path("out/quick") / picture).read_bytes().startswith(b"\x89PNG")
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert 'src="figures' not in page
    shown = {claim["section"] for claim in content["claims"] if not claim["measured"].startswith("nothing")}
    anchors = set(re.findall(r'<h2 id="(.*?)"', page))
    for section in shown:
        assert verb.write_report.__globals__["slug"](section) in anchors
        assert f"## {section}\n" in text
    assert [part["status"] for part in content["parts"]] == ["reused"] * 3
    assert set(content["depth"]["linformer"]) == {"16", "32"}
    assert len(list(Path("out/quick/evidence").iterdir())) == 3


def test_a_change_of_the_results_changes_the_verdict(place):
    verb.reproduce("quick")
    before = json.loads(Path("out/quick/results.json").read_text(encoding="utf-8"))["claims"]
    path = Path("runs/spectrum/results.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    for layer in content["layers"]:
        layer["mean_at_index"] = 0.3
    path.write_text(json.dumps(content), encoding="utf-8")
    verb.reproduce("quick")  # in the place of the first report
    after = json.loads(Path("out/quick/results.json").read_text(encoding="utf-8"))["claims"]
    assert (before[0]["verdict"], after[0]["verdict"]) == ("holds", "does not hold")


def test_a_step_that_fails_is_shown_and_the_others_go_on(place, capsys, monkeypatch):
    shutil.rmtree("runs/spectrum")

    def failing(recipe):
        raise ValueError("no such model")

    monkeypatch.setitem(verb.VERBS, "spectrum", (verb.VERBS["spectrum"][0], failing))
    assert cli.main(["reproduce", "--scale", "quick"]) == 2
    assert (
        "1 steps failed, and the report says so: spectrum spectrum.yaml: failed: no such model"
        in capsys.readouterr().err
    )
    text = Path("out/quick/README.md").read_text(encoding="utf-8")
    assert "**failed: no such model**" in text
    content = json.loads(Path("out/quick/results.json").read_text(encoding="utf-8"))
    assert [part["status"] for part in content["parts"]] == ["failed: no such model", "reused", "reused"]
    assert content["claims"][0]["verdict"] == "cannot be seen at this scale"


def test_what_has_not_run_is_run(place, monkeypatch):
    shutil.move("runs/theory", "theory-elsewhere")
    ran = []

    def running(recipe):
        ran.append(recipe)
        shutil.move("theory-elsewhere", "runs/theory")

    monkeypatch.setitem(verb.VERBS, "theory", (verb.VERBS["theory"][0], running))
    verb.reproduce("quick")
    assert ran == ["theory.yaml"]


def test_nothing_is_run_if_that_is_asked_and_empty_folders_are_an_error(place, capsys, monkeypatch):
    for name, (read, _) in verb.VERBS.items():
        monkeypatch.setitem(verb.VERBS, name, (read, lambda recipe: pytest.fail("it was run")))
    shutil.rmtree("runs/theory")
    assert cli.main(["reproduce", "--scale", "quick", "--no-run"]) == 0
    content = json.loads(Path("out/quick/results.json").read_text(encoding="utf-8"))
    assert [part["status"] for part in content["parts"]] == ["reused", "not run", "reused"]
    shutil.rmtree("runs")
    shutil.rmtree("out")
    assert cli.main(["reproduce", "--scale", "quick", "--no-run"]) == 2
    printed = capsys.readouterr().err
    assert "there are no results in runs/spectrum, runs/theory, runs/benchmark. Leave --no-run out" in printed
    assert not Path("out").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"verb": "theory"}'])
def test_broken_results_are_an_error_that_names_the_file(place, content, capsys):
    Path("runs/theory/results.json").write_text(content, encoding="utf-8")
    assert cli.main(["reproduce", "--scale", "quick", "--no-run"]) == 2
    assert "runs/theory/results.json " in capsys.readouterr().err


def test_results_of_another_recipe_are_not_taken_for_its_own(place):
    text = Path("theory.yaml").read_text(encoding="utf-8")
    Path("theory.yaml").write_text(text.replace("rows: 2", "rows: 3"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs/theory holds results of another recipe than theory.yaml"):
        verb.reproduce("quick", run=False)


def test_a_folder_with_something_else_in_it_is_left_alone(place):
    Path("out/quick").mkdir(parents=True)
    Path("out/quick/thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something that is no report"):
        verb.reproduce("quick", run=False)
    assert [path.name for path in Path("out/quick").iterdir()] == ["thesis.txt"]


def test_a_scale_that_is_not_here_or_names_nothing_is_refused(place, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="go to the folder of the repository"):
        verb.reproduce("cpu")
    write_scale({"output_dir": "out"})
    with pytest.raises(RecipeError, match="names no recipe"):
        verb.reproduce("quick")


def test_a_conversion_that_is_there_is_not_repeated_and_a_failure_is_kept(tmp_path):
    done = tmp_path / "done"
    done.mkdir()
    (done / "results.json").write_text("{}", encoding="utf-8")
    wanted = [verb.Conversion("none", str(done), 8), verb.Conversion(str(tmp_path / "none"), str(tmp_path / "x"), 8)]
    problems = verb.conversions(wanted)
    assert len(problems) == 1
    assert "none" in problems[0]
