"""The page of `linformer-hf reproduce`: claims and verdicts first, then every table and figure.

README.md has the figures beside it (figures/), report.html has them inside: one file to send. The results of every
verb are copied to evidence/, so the folder stands for itself.
"""

import base64
import html
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from ..utils.files import RESULTS_FILE, write_json, write_text
from ..utils.reporting import markdown_table
from .claims import CLAIMS, SPECTRUM, SPEED, STEPS, SWEEP, TASKS, THEOREMS
from .verdicts import FAILS, HOLDS, LEARNED, SETTLED, UNSEEN, Evidence


HEADINGS = {"spectrum": SPECTRUM, "theory": THEOREMS, "sweep": SWEEP, "compare": TASKS, "benchmark": SPEED}
TABLES = ("spectrum.md", "theory.md", "table.md", "tables.md")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; } img { max-width: 100%; } code { background: #f3f3f3; padding: 0 .2rem; }
.holds { background: #e3f4e3; } .fails { background: #fbe3e0; } .unseen { background: #fdf5dc; }
"""


@dataclass
class Step:
    """A recipe of a verb, and what came of it.

    Attributes:
        folder: where its results lie.
        status: run, reused, or failed: and why.
        content: its results.json; of a sweep or comparison that failed, with the cells that did not.
    """

    verb: str
    recipe: str
    folder: Path
    status: str = ""
    content: dict[str, Any] | None = None
    seconds: float = 0.0


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def judged(evidence: Evidence) -> list[dict[str, str]]:
    """Every claim with what was found."""
    rows = []
    for claim in CLAIMS:
        words = {"claim": claim.words, "place": claim.place, "rule": claim.rule, "section": claim.section}
        rows.append({**words, **asdict(claim.judge(evidence))})
    return rows


def claims_table(claims: Sequence[dict[str, str]]) -> str:
    rows = [
        [*map(claim.get, ("claim", "place", "measured", "basis")), f"**{claim['verdict']}**", link(claim["section"])]
        for claim in claims
    ]
    return markdown_table(["claim", "place", "measured here", "on", "verdict", "evidence"], rows)


def link(heading: str) -> str:
    return f"[{heading}](#{slug(heading)})"


def write_report(folder: Path, page: dict[str, Any], parts: Sequence[Step], evidence: Evidence) -> str:
    """README.md, report.html, figures/, evidence/ and, last, results.json; the table of claims is returned.

    Written to a folder beside `folder`, which then takes the place of an earlier report.

    Raises:
        ValueError: `folder` holds something that is no report.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "report.html").exists():
        raise ValueError(f"{folder} holds something that is no report; choose another reproduce.output_dir.")
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    for name in ("figures", "evidence"):
        (beside / name).mkdir(parents=True)
    claims = judged(evidence)
    table = claims_table(claims)
    text = markdown(page, parts, claims, table, beside)
    write_text(beside / "README.md", text)
    write_text(beside / "report.html", as_html(text, beside, f"The paper, measured: {page['scale']}"))
    kept = [
        {"verb": part.verb, "recipe": part.recipe, "folder": str(part.folder), "status": part.status, "s": part.seconds}
        for part in parts
    ]
    write_json(beside / RESULTS_FILE, {**page, "claims": claims, "parts": kept})
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return table


def markdown(
    page: dict[str, Any], parts: Sequence[Step], claims: Sequence[dict[str, str]], table: str, folder: Path
) -> str:
    """The page; what it shows is copied to `folder`."""
    versions = page["versions"]
    counts = Counter(claim["verdict"] for claim in claims)
    blocks = [
        f"# The paper, measured: {page['scale']}",
        "Linformer: Self-Attention with Linear Complexity (Wang et al. 2020, arXiv 2006.04768), claim by claim: "
        f"{'; '.join(f'{verdict}: {count}' for verdict, count in counts.items())}.",
        f"{page['device_name']}, {page['threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, linformer_hf {versions['linformer_hf']}, revision "
        f"{(page['revision'] or 'unknown')[:12]}; {page['date'][:10]}. To make it again: "
        f"`linformer-hf reproduce --scale {page['scale']}`.",
        "## Claims",
        table,
        "The verdicts are computed from the results by these rules (`src/linformer_hf/paper/claims.py`). Where seeds "
        "are compared, each is compared with the reference of the same seed; a claim **holds** if every seed is within "
        "the limit, it **does not hold** if every seed is beyond it in some comparison, and otherwise it **cannot be "
        "seen at this scale**: so also where nothing was measured, where a run failed, where the reference's "
        f"perplexity is less than {LEARNED:g} times below that of token frequencies, or where a perplexity still fell "
        f"by more than {SETTLED:.0%} over the last third of the updates: the paper's claims are about converged runs.",
        markdown_table(["claim", "holds if"], [[claim["claim"], claim["rule"]] for claim in claims]),
    ]
    for verb, heading in HEADINGS.items():
        own = [part for part in parts if part.verb == verb]
        if own:
            blocks.append(f"## {heading}")
            for part in own:
                blocks += shown(part, folder)
    depth = page["depth"]
    rows = [[name, *found.values()] for name, found in depth.items()]
    header = ["operations that wait for each other, one layer", *(f"N = {n}" for n in depth["linformer"])]
    blocks += [f"## {STEPS}", markdown_table(header, rows)]
    done = [[part.verb, f"`{part.recipe}`", part.status, part.seconds] for part in parts]
    blocks += ["## What ran", markdown_table(["verb", "recipe", "status", "s"], done)]
    blocks.append(f"{page['wall_seconds']:.0f} s in all; what was reused took its time earlier.")
    return "\n\n".join(blocks) + "\n"


def shown(part: Step, folder: Path) -> list[str]:
    """A step's table and figures, copied into the report."""
    name = f"{part.verb}-{Path(part.recipe).stem}"
    blocks = [f"### {part.recipe}"]
    if part.status.startswith("failed"):
        blocks.append(f"**{part.status}**")
    if part.content is None:
        return blocks if len(blocks) > 1 else [*blocks, part.status]
    shutil.copyfile(part.folder / RESULTS_FILE, folder / "evidence" / f"{name}.json")
    for table in TABLES:
        if (part.folder / table).exists():
            blocks.append((part.folder / table).read_text(encoding="utf-8").strip())
    for picture in sorted(part.folder.glob("*.png")):
        place = Path("figures") / f"{name}-{picture.name}"
        shutil.copyfile(picture, folder / place)
        blocks.append(f"![{picture.stem.replace('-', ' ')}]({place.as_posix()})")
    return blocks


def as_html(text: str, folder: Path, title: str) -> str:
    """One page with the figures inside and GitHub's anchors."""
    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(text)
    for token, after in itertools.pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", slug(after.content))
        for child in token.children or []:
            if child.type == "image":
                picture = (folder / str(child.attrs["src"])).read_bytes()
                child.attrSet("src", f"data:image/png;base64,{base64.b64encode(picture).decode()}")
    body = parser.renderer.render(tokens, parser.options, {})
    for verdict, kind in ((HOLDS, "holds"), (FAILS, "fails"), (UNSEEN, "unseen")):
        body = body.replace(
            f"<td><strong>{verdict}</strong></td>", f'<td class="{kind}"><strong>{verdict}</strong></td>'
        )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'
