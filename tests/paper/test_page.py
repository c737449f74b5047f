"""The report's page: anchors, figures inside, verdicts in colour, and what each step shows."""

import base64
import json

import pytest

from linformer_hf.paper.page import Step, as_html, claims_table, judged, link, shown, slug
from linformer_hf.paper.verdicts import CLAIMS, FAILS, HOLDS, UNSEEN


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Claims", "claims"),
        ("What ran", "what-ran"),
        ("Speed & memory (N = 512)", "speed--memory-n--512"),
        ("configs/quick.yaml", "configsquickyaml"),
        ("a_b - Größe", "a_b---größe"),
    ],
)
def test_a_slug_is_githubs_anchor(heading, anchor):
    assert slug(heading) == anchor
    assert link(heading) == f"[{heading}](#{anchor})"


def test_every_claim_is_a_row_with_what_was_found():
    rows = judged({})
    assert [row["claim"] for row in rows] == [claim.words for claim in CLAIMS]
    assert all(row.keys() == {"claim", "place", "rule", "section", "measured", "basis", "verdict"} for row in rows)
    table = claims_table([rows[0] | {"measured": "+1 %", "basis": "3 seeds", "verdict": HOLDS, "section": "A b"}])
    assert table.endswith(
        f"| {rows[0]['claim']} | {rows[0]['place']} | +1 % | 3 seeds | **holds** | [A b](#a-b) |",
    )


def test_the_html_is_one_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    verdicts = "\n".join(f"| **{verdict}** |" for verdict in (HOLDS, FAILS, UNSEEN))
    text = f"## What ran\n\n[there](#what-ran) ![a curve](a.png)\n\n| v |\n| --- |\n{verdicts}\n\n**{HOLDS}**"
    page = as_html(text, tmp_path, "K < N & more")
    assert '<h2 id="what-ran">What ran</h2>' in page
    assert f'<img src="data:image/png;base64,{base64.b64encode(b"picture").decode()}" alt="a curve"' in page
    assert "<title>K &lt; N &amp; more</title>" in page
    for verdict, kind in ((HOLDS, "holds"), (FAILS, "fails"), (UNSEEN, "unseen")):
        assert page.count(f'<td class="{kind}"><strong>{verdict}</strong></td>') == 1
    assert f"<p><strong>{HOLDS}</strong></p>" in page  # in text it is no verdict


def test_a_step_shows_its_tables_and_figures_and_leaves_its_evidence(tmp_path):
    folder, report = tmp_path / "run", tmp_path / "report"
    for place in (folder, report / "figures", report / "evidence"):
        place.mkdir(parents=True)
    (folder / "results.json").write_text('{"a": 1}')
    (folder / "table.md").write_text("| a |\n")
    (folder / "notes.md").write_text("not a table")
    (folder / "by-length.png").write_bytes(b"picture")
    step = Step("sweep", "configs/quick.yaml", folder, "reused", {"a": 1})
    picture = "![by length](figures/sweep-quick-by-length.png)"
    assert shown(step, report) == ["### configs/quick.yaml", "| a |", picture]
    assert (report / "figures" / "sweep-quick-by-length.png").read_bytes() == b"picture"
    assert json.loads((report / "evidence" / "sweep-quick.json").read_text()) == {"a": 1}
    step.status = "failed: cell b"  # the cells that did not are shown all the same
    assert shown(step, report) == ["### configs/quick.yaml", "**failed: cell b**", "| a |", picture]


@pytest.mark.parametrize(("status", "words"), [("not run", "not run"), ("failed: no disk", "**failed: no disk**")])
def test_a_step_without_results_says_why_once(tmp_path, status, words):
    assert shown(Step("theory", "t.yaml", tmp_path, status), tmp_path) == ["### t.yaml", words]
