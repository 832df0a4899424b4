"""Tables of a comparison as text, Markdown and CSV."""

import csv
import io

from lcpt.evaluation.comparison_tables import (
    COLUMNS,
    Table,
    as_markdown,
    as_text,
    differences_as_csv,
    differences_table,
    settings_as_csv,
    settings_table,
)

NAME = "a|b <i>$x$</i>"


def report(**paired):
    none = {"mean": None, "spread": None}
    figures = dict.fromkeys(COLUMNS, none) | {"loss": {"mean": 3.14159265358979, "spread": 0.25}}
    row = {"name": NAME, "kinds": "softmax", "seeds": [0, 1], "runs": 3, **figures}
    return {"rows": [row], "paired": [{"setting": NAME, "minus": "base", **paired}] if paired else [], "warnings": []}


def difference(**changes):
    figure = {"mean": -0.5, "interval": [-0.75, -0.25], "seeds_mean": -0.125, "seeds_spread": 0.0625}
    row = {"refused": None, "documents": 12, "few": False, "seeds": [0, 1], "p": 0.03125, "bits_per_byte": figure}
    return row | {"nats_per_token": None} | changes


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_settings():
    table = settings_table(report())
    assert table.head == ["", "kinds", "loss"] and table.rows == [[f"{NAME} (2 seeds)", "softmax", "3.142 ± 0.250"]]
    [row] = read(settings_as_csv(report()))
    assert (row["name"], row["seeds"], row["runs"]) == (NAME, "0 1", "3")
    assert (float(row["loss"]), row["loss_spread"], row["recall"]) == (3.14159265358979, "0.25", "")


def test_differences():
    table = differences_table(report(**difference()))
    assert table.rows == [[NAME, "−0.5000", "−0.7500 to −0.2500", "0.031", "12", "−0.1250 ± 0.0625 (2)", "-", "-"]]
    assert table.head[0] == "minus base" and table.notes == []
    [row] = read(differences_as_csv(report(**difference())))
    assert (row["bits_per_byte_low"], row["bits_per_byte_seeds_spread"], row["nats_per_token"]) == (
        "-0.75",
        "0.0625",
        "",
    )
    assert differences_table(report()) is None


def test_few_documents_and_refusals_are_notes():
    table = differences_table(report(**difference(few=True, documents=1)))
    assert table.notes == [f"{NAME} minus base: 1 document, too few to rely on an interval or p"] and table.rows
    refused = report(refused="different window: 32 of b, 64 of a")
    table = differences_table(refused)
    assert table.notes == [f"{NAME} minus base: different window: 32 of b, 64 of a"] and not table.rows
    [row] = read(differences_as_csv(refused))
    assert row["refused"] == "different window: 32 of b, 64 of a" and row["p"] == row["bits_per_byte"] == ""


def test_wide_tables_are_blocks_of_at_most_120_columns():
    head = ["", *(f"column {n}" for n in range(30))]
    text = as_text(Table(head=head, rows=[["a name", *(f"{n}.5" for n in range(30))]]))
    blocks = text.split("\n\n")
    assert len(blocks) == 3 and max(map(len, text.splitlines())) <= 120
    assert all(block.splitlines()[1].startswith("a name") for block in blocks)
    assert [word for block in blocks for word in block.splitlines()[1].split()[2:]] == [f"{n}.5" for n in range(30)]


def test_markdown_is_escaped():
    lines = as_markdown(settings_table(report())).splitlines()
    assert lines[1] == "| --- | --- | ---: |"
    assert lines[2] == r"| a\|b &lt;i&gt;$x$&lt;/i&gt; (2 seeds) | softmax | 3.142 ± 0.250 |"
