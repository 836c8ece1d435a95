"""The inputs on which a result's outputs are compared with the original's, and what they are."""

from __future__ import annotations

from graphprune.calibrate import synthesise
from graphprune.calibrate.choose import WORK
from graphprune.calibrate.preprocess import picture_inputs
from graphprune.calibrate.samples import Chunked
from graphprune.search import RANDOM, judged_inputs, rows_of_feed
from graphprune.study import Study
from graphprune.validate import Compared
from graphprune.wording import counted

MADE_UP = 16  # pictures where nothing was calibrated
RUNS = 100  # of one sample, about, until their range is known


def compared(studied: Study) -> Compared:
    """Calibration inputs where there are any. Else pictures are made up for a model that reads
    such, unless it takes long to find their range, since noise is nothing to it; else random."""
    feeds = judged_inputs(studied)
    if studied.inputs is not None:
        rows = sum(map(rows_of_feed, feeds))
        return Compared(f"{rows} of the calibration inputs", feeds)
    analysis, model = studied.prepared.analysis, studied.prepared.original
    macs = analysis.cost.of(analysis.nothing_removed).macs
    if not picture_inputs(model, analysis.shapes) or RUNS * macs > WORK:
        return Compared(f"{RANDOM} random inputs", feeds)
    samples = synthesise(model, analysis.shapes, MADE_UP, studied.seed)
    chunked = Chunked(samples, model, MADE_UP)
    rows = sum(map(rows_of_feed, chunked))
    return Compared(f"{counted(rows, 'made-up picture')}", chunked)
