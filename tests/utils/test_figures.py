"""Pictures: their size, their colours, and that nothing of matplotlib is set for the whole process."""

import struct
import sys

import pytest

from linformer_hf.utils.figures import new_figure, plain_ticks, save_figure, shades


def test_a_picture_is_a_png_of_its_size_in_inches_and_needs_no_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    figure, axes = new_figure((2, 1.5), ncols=3)
    assert len(axes) == 3
    axes[0].plot([1, 2])
    save_figure(figure, tmp_path / "curve.png")
    content = (tmp_path / "curve.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (240, 180)  # 120 dots per inch
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_the_name_need_not_end_in_png(tmp_path):
    figure, _ = new_figure((1, 1))
    save_figure(figure, tmp_path / "curve.pdf")
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_shades_go_from_dark_to_bright(number):
    colours = shades(number)
    brightness = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue, _ in colours]
    assert len(colours) == number
    assert brightness == sorted(brightness)
    assert len(set(colours)) == number
    if number > 1:
        assert sum(shades(number, brightest=0.5)[-1][:3]) < sum(colours[-1][:3])


@pytest.mark.parametrize(("low", "high", "told"), [(12, 33, {"20", "30"}), (10, 180, {"10", "100", "20"})])
def test_an_axis_by_logarithms_is_told_in_plain_numbers(low, high, told):
    figure, axes = new_figure((4, 3))
    axes.plot([1, 2], [low, high])
    axes.set(yscale="log")
    plain_ticks(axes.yaxis)
    figure.canvas.draw()
    words = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert told <= set(words)
    assert not any("10^" in word for word in words)
