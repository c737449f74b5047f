"""Tables at a run's end: drawn on a terminal, Markdown elsewhere."""

import io

import pytest

from linformer_hf.utils.reporting import summary_table
from linformer_hf.utils.runs import show


CONTENT = {
    "metrics": {"test_accuracy": 0.9134, "test_rows": 5132},
    "baselines": {"majority": 0.5},
    "steps": 400,
    "wall_seconds": 19.25,
    "train_seconds": 12.5,
    "peak_memory_mib": 812.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_tables_are_drawn_for_people_only(monkeypatch, stream):
    written = stream()
    monkeypatch.setattr("sys.stdout", written)
    show(summary_table(CONTENT))
    text = written.getvalue()
    assert ("| test rows | 5,132 |" in text) == (stream is io.StringIO)
    for cell in ("test accuracy", "0.9134", "5,132", "majority (without a model)", "0.5", "400", "19.25", "812"):
        assert cell in text
    assert ("\u2501" in text or "\u2500" in text) == (stream is Terminal)
