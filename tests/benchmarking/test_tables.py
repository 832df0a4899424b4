from lcpt.benchmarking.attention_report import draw
from lcpt.benchmarking.tables import fastest_softmax, short_table, table


def row(method, p50, context=1024, mode="forward", **more):
    return {
        "method": method,
        "context": context,
        "batch": 2,
        "mode": mode,
        "backend": "torch",
        "dtype": "fp32",
        "repeats": 3,
        "milliseconds": {"p10": p50 / 2, "p50": p50, "p90": 2 * p50},
        "peak_memory_bytes": 2**21,
        "percent_of_peak": None,
        "speedup": {},
    } | more


ROWS = [
    row("polysketch", 2.0, percent_of_peak={"flops": 41.6, "bytes": 12.2}, speedup={"sdpa_flash": 4.0, "window": 0.5}),
    row("sdpa_flash", 8.0),
    row("sdpa_cudnn", 6.0),
    row("window", 1.0),
    row("sdpa_flash", 0.1, mode="forward_backward"),
    row("flex", 3.0, context=2048),
]


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_fastest_softmax_is_of_the_same_context_and_mode_and_no_window():
    assert fastest_softmax(ROWS[0], ROWS) is ROWS[2]
    assert fastest_softmax(row("polysketch", 1.0, context=99), ROWS) is None


def test_table_shows_every_figure_of_a_row():
    titles, rule, first, *others = cells(table(ROWS))
    named = dict(zip(titles, first, strict=True))
    assert named["x fastest softmax"] == "3.00" and named["times as fast as"] == "sdpa_flash: 4.00, window: 0.50"
    assert named["tokens/s"] == "1,024,000" and named["median ms"] == "2.000" and named["peak MiB"] == "2.0"
    assert (named["% of peak FLOP/s"], named["% of bandwidth"]) == ("42", "12")
    assert len(others) == 5 and dict(zip(titles, others[0], strict=True))["% of bandwidth"] == ""
    assert all(set(cell) <= set("-:") and cell for cell in rule)


def test_a_terminal_shows_once_what_all_rows_share():
    above, *shown = short_table(ROWS).splitlines()
    assert above == "batch 2, backend torch, passes 3"
    titles, _, first, *_ = cells("\n".join(shown))
    named = dict(zip(titles, first, strict=True))
    assert named["x softmax"] == "3.00" and not {"batch", "backend", "passes", "times as fast as"} & set(titles)
    mixed = short_table([*ROWS, row("polysketch", 2.0, backend="triton")])
    assert mixed.splitlines()[0] == "batch 2, passes 3" and "backend" in cells(mixed)[1]
    wide = [ROWS[0] | {"method": "sdpa_flash", "context": 131072, "mode": "forward_backward"}] * 2
    assert max(map(len, short_table(wide).splitlines())) <= 120


def test_a_column_of_which_nothing_is_known_is_left_out():
    titles = cells(table([row("tiny", 5.0)]))[0]
    assert "% of bandwidth" not in titles and "x fastest softmax" not in titles and "median ms" in titles


def test_the_picture_is_a_png(tmp_path):
    draw(ROWS, "a device", tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
