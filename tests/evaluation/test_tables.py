"""Tables and the picture of a results.json that is given."""

import pytest

from linformer_hf.evaluation.tables import differences_table, lengths_table, markdown, pieces_table, plot


ONE = {"view": "one vector", "size": None, "count": 10, "units": 10}


def content() -> dict:
    scores, differences = [], []
    bible = "search-bible"
    for task, length, metric in ((bible, None, "first"), (bible, None, "among ten"), ("needle", 4096, "first")):
        facts = {"task": task, "length": length, "metric": metric, **ONE}
        scores += [facts | {"method": name, "value": value} for name, value in (("pieces-128", 0.5), ("mine", 0.75))]
        differences.append(
            facts
            | {"method": "mine", "value": 0.75, "rival": "pieces-128", "rival_value": 0.5, "ratio": 1.5}
            | {"difference": 0.25, "low": -0.125, "high": 0.5}
        )
    late = differences[0] | {"view": "best piece", "size": 128, "value": 0.0, "rival_value": 0.0, "ratio": None}
    tokens = {"median": 3000.0, "lowest": 1500, "highest": 4096}
    task = {"task": "search-bible", "length": None, "about": "what it is", "documents": 80, "tokens": tokens}
    times = {"wall_s": 0.5, "wall_range_s": [0.4, 0.61], "samples": 5, "contended": 2}
    times |= {"peak_mib": 20.4, "tokens": [4096, 4000]}
    return {
        "methods": ["pieces-128", "mine"],
        "tasks": [task | {"queries": 200, "searched_documents": 49, "classes": {}, "groups": 0}],
        "scores": scores,
        "differences": [*differences, late],
        "mean_differences": [{"method": "mine", "tasks": ["a", "b"], "difference": 0.1, "low": 0.05, "high": 0.15}],
        "over_lengths": [scores[-1] | {"from_length": 512, "from_value": 1.0, "ratio": 0.75}],
        "costs": [{"method": name, **times} for name in ("pieces-128", "mine")],
        "threads": 2,
        "dtype": "float32",
        "device_name": "a processor",
    }


def test_differences_stand_beside_their_rival_with_their_interval():
    lines = differences_table(content()).splitlines()
    assert lines[0] == "| task | measure | best pieces | mine |"
    assert lines[2] == "| search-bible | found first | 0.500 (pieces-128) | +0.250 (-0.125 to +0.500) |"
    assert lines[4] == "| needle, 4,096 tokens | found first | 0.500 (pieces-128) | +0.250 (-0.125 to +0.500) |"
    assert lines[5] == "| mean over 2 tasks |  |  | +0.100 (+0.050 to +0.150) |"


def test_a_ratio_that_is_lost_or_has_no_meaning_is_shown_too():
    assert "| 128 | 0.000 | 0.000; -; +0.250 (-0.125 to +0.500) |" in pieces_table(content(), "best piece")
    assert "| needle, 4,096 / 512 tokens | one vector | 0.750 (0.750 / 1.000) |" in lengths_table(
        content()["over_lengths"]
    )


def test_every_table_is_there_and_what_is_missing_is_left_out():
    text = markdown(content())
    assert text.count("**") == 12
    blended = content()
    blended["differences"].append(blended["differences"][-1] | {"view": "best piece, blended", "value": 0.5})
    assert (
        "| 128 | 0.000 | 0.500; -; +0.250 (-0.125 to +0.500) |" in markdown(blended).split("half the source's alone")[1]
    )
    assert "| search-bible | 80 | 3,000 (1,500 to 4,096) | 200 |  |  | what it is |" in text
    assert "| mine | 500 (400 to 610) | 20 | 2 of 5 |" in text
    assert "Documents of 4,096, 4,000 tokens, 2 thread(s), float32, a processor" in text
    assert "-" in text.split("| needle, 4,096 tokens |")[1]
    without = markdown(content() | {"over_lengths": [], "differences": content()["differences"][:2]})
    assert without.count("**") == 8


@pytest.mark.parametrize("models", [1, 4])
def test_the_picture_shows_each_difference_with_its_interval(tmp_path, monkeypatch, models):
    from linformer_hf.evaluation import tables

    shown = []
    monkeypatch.setattr(tables, "save_figure", lambda figure, path: shown.append((figure, path)))
    given = content()
    for key in ("differences", "mean_differences"):
        given[key] = [row | {"method": f"mine {i}"} for row in given[key] for i in range(models)]
    plot(tmp_path / "new" / "d.png", given)
    ((figure, path),) = shown
    assert path.parent.is_dir()
    (axes,) = figure.axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["search-bible", "needle, 4,096 tokens", "mean over the tasks"]
    assert len(axes.containers) == models
    for bars in axes.containers:
        points, _, (lines,) = bars.lines
        assert points.get_xdata().tolist() == [0.25, 0.25, 0.1]
        ends = [segment[:, 0].tolist() for segment in lines.get_segments()]
        assert ends == [pytest.approx([-0.125, 0.5]), pytest.approx([-0.125, 0.5]), pytest.approx([0.05, 0.15])]
