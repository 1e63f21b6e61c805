"""Stored records in, figures and one self-contained HTML page out.

A report never sees a network: it reads a :class:`Record` (``result.json``) and the arrays beside it
(``relabelling.npz``), so it can be drawn again anywhere. Needs the extra ``report``.
"""

from isthmus.report._draw_lines import draw_line
from isthmus.report._draw_theory import THEORY_PICTURES, TheoryPicture, draw_theory
from isthmus.report._format import NATS, unit_of
from isthmus.report._record import (
    Record,
    RecordedBlock,
    RecordedCost,
    RecordedCoupling,
    RecordedDimension,
    RecordedGroup,
    RecordedLine,
    RecordedMethod,
    RecordedNetwork,
    RecordedPin,
    RecordedScore,
    RecordedSlot,
    RecordedSymmetry,
    RecordedVerification,
    RecordedVersions,
    check_record,
    read_record,
)
from isthmus.report._study_figures import write_study_figures
from isthmus.report._study_page import write_study_report
from isthmus.report._study_table import BarrierTable, PlaceRow, Spread, barrier_tables
from isthmus.report._write import write_report

__all__ = [
    "NATS",
    "unit_of",
    "write_report",
    "write_study_figures",
    "write_study_report",
    "barrier_tables",
    "BarrierTable",
    "PlaceRow",
    "Spread",
    "draw_line",
    "draw_theory",
    "THEORY_PICTURES",
    "TheoryPicture",
    "read_record",
    "check_record",
    "Record",
    "RecordedNetwork",
    "RecordedScore",
    "RecordedSymmetry",
    "RecordedGroup",
    "RecordedSlot",
    "RecordedPin",
    "RecordedVerification",
    "RecordedMethod",
    "RecordedLine",
    "RecordedBlock",
    "RecordedCost",
    "RecordedCoupling",
    "RecordedDimension",
    "RecordedVersions",
]
