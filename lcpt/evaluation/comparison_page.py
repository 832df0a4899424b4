"""Write a comparison as one HTML page that needs no other file: pictures inside, no script, readable on a phone and
on paper. All text is escaped: names of runs come from outside."""

from __future__ import annotations

import base64
import shlex
from html import escape

from lcpt.evaluation.compared_runs import Run
from lcpt.evaluation.comparison_pictures import Picture
from lcpt.evaluation.comparison_tables import Table, differences_table, settings_table
from lcpt.evaluation.mean_parts import context_gains, mean_lines, retrieval_summary
from lcpt.evaluation.setting_differences import scoring

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p.note { color: #555; margin: .3rem 0; max-width: 45rem; }
p.warning { background: #fff4d6; border-left: .3rem solid #d99a00; padding: .4rem .8rem; margin: .4rem 0; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th.name, td.name { text-align: left; }
th.name:first-child, td.name:first-child { position: sticky; left: 0; background: #fff; }
img { display: block; width: 100%; max-width: 54rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; margin: .3rem 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11px; } div.table { overflow: visible; }
  table { font-size: 9px; } th, td { padding: .1rem .4rem; } img { width: 80%; }
  img, tr { break-inside: avoid; } h2, h3, p.note { break-after: avoid; } }
"""
PAIRED = (
    "Bits a byte of each setting minus those of the first, on the same documents: below 0 the setting is better. A "
    "document's nats are averaged over the seeds of a setting. The interval and the two-sided p come from flips of the "
    "documents' signs: what other documents would change for these trained models. Over seeds: the difference's mean ± "
    "standard deviation, and how many seeds: what another training would change. A claim needs both."
)
GAIN = "Loss of the same tokens with that many before them; in brackets, how far it is below the first row."


def page(report: dict, settings: dict[str, list[Run]], pictures: list[Picture]) -> str:
    """Write the report of lcpt.evaluation.comparison.compare, with its pictures, as HTML."""
    title = f"Comparison of {', '.join(settings)}"
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>\n' for warning in report["warnings"])
    sections = [
        _section(
            "What each run cost and reached", "Mean ± standard deviation over seeds.", _turned(settings_table(report))
        )
    ]
    if differences := differences_table(report):
        sections.append(_section("Paired differences", PAIRED, differences))
    if gains := context_gain_table(settings):
        sections.append(_section("Context gain in figures", GAIN, gains))
    if retrieval := retrieval_table(settings):
        note = "Right answers in %, and their 95 % interval, both averaged over seeds."
        sections.append(_section("Retrieval in figures", note, retrieval))
    sections += [_picture(picture) for picture in pictures]
    body = "\n".join((f"<h1>{escape(title)}</h1>", warnings, *sections, _measured(settings)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def context_gain_table(settings: dict[str, list[Run]]) -> Table | None:
    """Show the loss at each context and its gain over the smallest, a column a setting; None where nobody has it."""
    lines = mean_lines(settings, context_gains, ("context",))
    if not lines:
        return None
    contexts = sorted({part["context"] for _, parts in lines for part in parts})
    found = {name: {part["context"]: part for part in parts} for name, parts in lines}
    rows = [
        [f"{n:,} tokens", *(_gain(parts[n], n == contexts[0]) if n in parts else "-" for parts in found.values())]
        for n in contexts
    ]
    return Table(head=["", *found], rows=rows)


def _gain(part: dict, smallest: bool) -> str:
    if smallest:
        return f"{part['loss']:.4f}"
    interval = part.get("gain_interval")
    return f"{part['loss']:.4f} ({part['gain']:+.4f}" + (": {:.4f} to {:.4f})".format(*interval) if interval else ")")


def retrieval_table(settings: dict[str, list[Run]]) -> Table | None:
    """Show the accuracy of each task at each context, a column a setting; None where nobody has it."""
    lines = dict(mean_lines(settings, retrieval_summary, ("task", "context")))
    if not lines:
        return None
    found = {name: {(part["task"], part["context"]): part for part in parts} for name, parts in lines.items()}
    keys = dict.fromkeys(key for parts in found.values() for key in parts)
    rows = []
    for task, context in keys:
        chance = next(parts[task, context]["chance"] for parts in found.values() if (task, context) in parts)
        cells = [_accuracy(parts.get((task, context))) for parts in found.values()]
        rows.append([task, f"{context:,}", *cells, "-" if chance is None else f"{100 * chance:.1f}"])
    return Table(head=["task", "context", *found, "chance"], rows=rows)


def _accuracy(part: dict | None) -> str:
    if part is None:
        return "-"
    interval = part.get("interval")
    return f"{100 * part['accuracy']:.1f}" + (
        " ({:.1f} to {:.1f})".format(*(100 * end for end in interval)) if interval else ""
    )


def _turned(table: Table) -> Table:
    """Make rows of columns: few settings of many figures are narrower so, as a phone and paper are."""
    head, *rows = map(list, zip(table.head, *table.rows, strict=True))
    return Table(head=head, rows=rows)


def _section(title: str, note: str, table: Table) -> str:
    notes = "".join(f'<p class="warning">{escape(text)}</p>\n' for text in table.notes)
    cells = f"{_table(table)}\n" if table.rows else ""
    return f'<section>\n<h2>{escape(title)}</h2>\n{cells}<p class="note">{escape(note)}</p>\n{notes}</section>'


def _table(table: Table) -> str:
    def line(cells: list[str], tag: str) -> str:
        marked = (f'<{tag} class="name">' if n < table.names else f"<{tag}>" for n in range(len(cells)))
        return f"<tr>{''.join(f'{mark}{escape(x)}</{tag}>' for mark, x in zip(marked, cells, strict=True))}</tr>"

    rows = "\n".join(line(row, "td") for row in table.rows)
    head = line(table.head, "th")
    return f'<div class="table"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode()
    return (
        f'<section>\n<h2>{escape(picture.title)}</h2>\n<p class="note">{escape(picture.note)}</p>\n'
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">\n</section>'
    )


def _measured(settings: dict[str, list[Run]]) -> str:
    """Say what was measured and how: once what all runs share, then what is a run's own."""
    runs = [run for group in settings.values() for run in group]
    facts = [facts_of(run) for run in runs]
    shared = {
        name: value for name, value in facts[0].items() if runs[1:] and all(one.get(name) == value for one in facts)
    }
    parts = ["<h2>What was measured</h2>", "<h3>All runs</h3>" * bool(shared), _list(shared)]
    for run, own in zip(runs, facts, strict=True):
        rest = {name: value for name, value in own.items() if name not in shared}
        parts.append(f"<section>\n<h3>{escape(run.name)}</h3>\n{_list(rest)}</section>")
    return "\n".join(parts)


def _list(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts.items())
    return f"<dl>\n{items}</dl>\n" if items else ""


def facts_of(run: Run) -> dict[str, str]:
    """Collect what a reader needs to repeat a run and its evaluation, as far as the folder tells."""
    facts = {
        "folder": str(run.folder),
        "seed": str(run.seed),
        "training data": run.fingerprint,
        "steps, tokens": f"{run.rows[-1]['step']:,}, {run.rows[-1]['tokens']:,}",
        "device": run.device,
    }
    environment = run.environment
    if command := environment.get("command"):
        facts["command"] = shlex.join(command)
    if commit := environment.get("git_commit"):
        facts["commit"] = str(commit)
    if versions := environment.get("versions"):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    for file, report in (("evaluation", run.evaluation), ("recall", run.recall), ("retrieval", run.retrieval)):
        for name in ("checkpoint", "step", "data", "fingerprint", "samples", "documents_scored", "tokens_scored"):
            if report and report.get(name) is not None:
                facts[f"{file}: {name.replace('_', ' ')}"] = str(report[name])
    if run.evaluation:
        facts |= {f"evaluation: {name.replace('_', ' ')}": str(x) for name, x in scoring(run.evaluation).items()}
        for name in ("bytes_scored", "position_windows"):
            if name in run.evaluation:
                facts[f"evaluation: {name.replace('_', ' ')}"] = str(run.evaluation[name])
    return facts
