import json
import math

import pytest

from safekern.tables import Column, Table, printable

TABLE = Table(
    [Column("layer"), Column("component"), Column("numel", "{:,}", "of"), Column("share", "{:.1%}")],
    [(0, "q_proj", 1234, 0.5), (None, "a", 7, 0.25)],
)


def test_text_is_aligned_by_kind():
    assert str(TABLE).splitlines() == [
        "layer  component     of  share",
        "    0  q_proj     1,234  50.0%",
        "    -  a              7  25.0%",
    ]


def test_records_are_plain_values_under_the_keys():
    assert TABLE.records()[1] == {"layer": None, "component": "a", "numel": 7, "share": 0.25}
    odd = Table([Column("x"), Column("y")], [(math.nan, math.inf)])
    assert json.dumps(odd.records(), allow_nan=False) == '[{"x": null, "y": null}]'


def test_an_empty_table_has_its_headings():
    assert str(Table(TABLE.columns, [])) == "layer  component  of  share"
    assert Table(TABLE.columns, []).records() == []


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError):
        str(Table([Column("x")], [(1, 2)]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 名前", "naïve 名前"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert shown in str(Table([Column("name")], [(text,)]))
    shown.encode()
