"""Draw the pictures of a comparison, one line or panel a setting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lcpt.evaluation import loss_plots, retrieval_plots
from lcpt.evaluation.compared_runs import Run
from lcpt.evaluation.comparison import loss_over, repeated_bigrams
from lcpt.evaluation.mean_parts import context_gains, mean_lines
from lcpt.utils.figures import Heading

OVER_DOCUMENTS = "95 % over documents, the ends averaged over seeds; what another seed would change is not in it."
SHADED = "shaded: 95 % over documents"
BANDS, BARS = f"Shaded: {OVER_DOCUMENTS}", f"Bars: {OVER_DOCUMENTS}"


SAME_TEXTS = (
    "Only windows that reach the last bin, so that every bin is of the same texts. The gray line above is a model that "
    f"sees no context: where it moves, the texts do, not the use of context. {BANDS}"
)


@dataclass(frozen=True, slots=True)
class Picture:
    title: str
    file: Path
    note: str  # what it shows, and what to beware of

    def heading(self, settings: dict[str, list[Run]], *more: str) -> Heading:
        """Return what stands above and below it in the file, where its note and the page are missing."""
        runs = [run for group in settings.values() for run in group]
        devices = ", ".join(dict.fromkeys(run.device for run in runs))
        precisions = ", ".join(dict.fromkeys(run.config["training"]["precision"] for run in runs))
        return Heading(self.title, f"{len(runs)} run{'s' * (len(runs) > 1)} on {devices}, {precisions}", *more)


def draw(settings: dict[str, list[Run]], folder: Path) -> list[Picture]:
    """Draw into the folder what the runs have measured, and return what was drawn."""
    return [
        *_training(settings, folder),
        *_positions(settings, folder),
        *_context_gain(settings, folder),
        *_bigrams(settings, folder),
        *_recall(settings, folder),
        *_retrieval(settings, folder),
    ]


def _training(settings: dict[str, list[Run]], folder: Path) -> list[Picture]:
    pictures = []
    for wall_time, x, file in ((False, "tokens", "tokens"), (True, "seconds of training steps", "time")):
        lines = [(name, *loss_over(run, wall_time)) for name, group in settings.items() for run in group]
        picture = Picture(
            f"Training loss over {file}",
            folder / f"loss_over_{file}.png",
            "A line a run: a running mean over a 50th of its steps.",
        )
        loss_plots.training_losses(picture.heading(settings), lines, x, picture.file)
        pictures.append(picture)
    return pictures


def _positions(settings: dict[str, list[Run]], folder: Path) -> list[Picture]:
    lines = mean_lines(settings, _loss_by_position, ("start", "end"))
    if not lines:
        return []
    unigram = next(([part for part in parts if part.get("unigram") is not None] for _, parts in lines), [])
    note = SAME_TEXTS if unigram else "Bins may be of different texts: windows that end early have early tokens alone."
    picture = Picture("Loss by position", folder / "loss_by_position.png", note)
    loss_plots.bins_with_intervals(picture.heading(settings, SHADED), lines, unigram, picture.file)
    return [picture]


def _context_gain(settings: dict[str, list[Run]], folder: Path) -> list[Picture]:
    lines = mean_lines(settings, context_gains, ("context",))
    if not lines:
        return []
    note = f"The same tokens, with that many before them. Below, what more context gains, paired over documents. {BARS}"
    picture = Picture("Context gain", folder / "context_gain.png", note)
    loss_plots.context_gain(picture.heading(settings, "bars: 95 % over documents"), lines, picture.file)
    return [picture]


def _bigrams(settings: dict[str, list[Run]], folder: Path) -> list[Picture]:
    pictures = []
    notes = {
        "repeated": "Tokens that stood after the same token before, in their window or carried document.",
        "rare": "Those of them whose two tokens no other scored document holds: low loss needs memory.",
    }
    for number, (which, note) in enumerate(notes.items()):
        if lines := mean_lines(settings, partial(_bigrams_by_distance, number), ("start", "end")):
            title = f"Loss on {which} bigrams"
            picture = Picture(title, folder / f"loss_on_{which}_bigrams.png", note)
            x = "tokens since the bigram was last seen"
            y = f"loss on {which} bigrams (nats a token)"
            loss_plots.loss_by_distance(picture.heading(settings), lines, x, y, picture.file)
            pictures.append(picture)
    return pictures


def _recall(settings: dict[str, list[Run]], folder: Path) -> list[Picture]:
    lines = mean_lines(settings, _recall_by_distance, ("start", "end"))
    if not lines:
        return []
    picture = Picture("Recall", folder / "recall_by_distance.png", "Answers of the task in recall.json that are right.")
    loss_plots.recall_by_distance(picture.heading(settings), lines, None, picture.file)
    return [picture]


def _retrieval(settings: dict[str, list[Run]], folder: Path) -> list[Picture]:
    reports = [run.retrieval for group in settings.values() for run in group if run.retrieval]
    tasks = dict.fromkeys(row["task"] for report in reports for row in report["rows"])
    pictures = []
    for number, task in enumerate(tasks):
        panels = mean_lines(settings, partial(_retrieval_rows, task), ("context", "depth"))
        name = re.sub(r"[^A-Za-z0-9_-]", "-", task)
        note = "Right answers in %, the mean over seeds: depth 0 % is the beginning of the text, 100 % its end."
        picture = Picture(f"Retrieval: {task}", folder / f"retrieval_{number}_{name}.png", note)
        retrieval_plots.accuracy_maps(picture.heading(settings), panels, picture.file)
        pictures.append(picture)
    return pictures


def _loss_by_position(run: Run) -> list[dict] | None:
    return run.evaluation["loss_by_position"] if run.evaluation else None


def _bigrams_by_distance(number: int, run: Run) -> list[dict] | None:
    return repeated_bigrams(run)[number].get("by_distance")


def _recall_by_distance(run: Run) -> list[dict] | None:
    return run.recall["recall_by_distance"] if run.recall else None


def _retrieval_rows(task: str, run: Run) -> list[dict] | None:
    return [row for row in run.retrieval["rows"] if row["task"] == task] if run.retrieval else None
