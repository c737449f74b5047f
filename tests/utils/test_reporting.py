"""Numbers and tables as they are printed."""

import pytest
from markdown_it import MarkdownIt

from linformer_hf.utils.reporting import format_number, markdown_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (-1234, "-1,234"),
        (0.123456, "0.1235"),
        (12.0, "12"),
        (999.94, "999.9"),
        (1000.0, "1,000"),
        (-1234567.8, "-1,234,568"),
        (0.00001234, "1.234e-05"),
        (float("nan"), "nan"),
        (True, "True"),
        ("12345", "12345"),
        (None, "None"),
    ],
)
def test_numbers_have_four_digits_or_separated_thousands(value, text):
    assert format_number(value) == text


def test_a_table_by_hand():
    text = "| name | N |\n| --- | --- |\n| a | 1,024 |\n| b | 0.5 |"
    assert markdown_table(["name", "N"], [["a", 1024], ["b", 0.5]]) == text


def test_a_table_is_one_to_a_reader_of_markdown_also_without_rows():
    for rows, cells in (([], 0), ([[1, 2, 3]], 3)):
        html = MarkdownIt("commonmark").enable("table").render(markdown_table(["a", "b", "c"], rows))
        assert (html.count("<th>"), html.count("<td>")) == (3, cells)
