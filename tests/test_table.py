"""Tables line up."""

from __future__ import annotations

from instantft.table import format_table


def test_columns_line_up() -> None:
    assert format_table(("name", "n"), [("a", 5), ("longer", 1000)]).splitlines() == [
        "name       n",
        "────────────",
        "a          5",
        "longer  1000",
    ]


def test_no_rows() -> None:
    assert format_table(("name",), []) == "name\n────"
