"""Studies: data sets by name, networks sized to them, training that a seed determines, and the study engine.

The engine (:func:`read_study`, :func:`run_study` and what they need) is imported on first use, because it needs
packages of the ``study`` extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from isthmus.errors import StudyError
from isthmus.study._compare import Comparison, compare
from isthmus.study._demo import DemoResult, DemoSettings, run_demo
from isthmus.study._device import check_device
from isthmus.training import (
    DATASETS,
    FAMILIES,
    SPLITS,
    Dataset,
    DatasetBatches,
    EpochRecord,
    Normalisation,
    TrainResult,
    TrainSettings,
    can_stack,
    derive_seed,
    initialise,
    load_dataset,
    network_for,
    read_normalise,
    resolve_data,
    to_batches,
    train,
    train_stacked,
)

if TYPE_CHECKING:
    from isthmus.study._config import (
        DataConfig,
        MeasureConfig,
        NetworkConfig,
        StudyConfig,
        TrainingConfig,
        Variant,
        preset_names,
        preset_text,
        read_study,
    )
    from isthmus.study._continuation import check_continuation
    from isthmus.study._estimate import Estimate, estimate_study
    from isthmus.study._executors import AbstractExecutor, InProcess, Job, LocalProcesses, OnRay, Outcome
    from isthmus.study._export import export_study, read_rows, read_run
    from isthmus.study._plan import NetworkRef, StudyPlan, Unit
    from isthmus.study._rate import transport_exponent
    from isthmus.study._runner import Progress, StudyStatus, make_plan, run_study, study_status
    from isthmus.study._sinks import AbstractSink, Scalar, TensorBoard, WeightsAndBiases

from isthmus.study._threads import torch_threads

__all__ = [
    "torch_threads",
    "DATASETS",
    "SPLITS",
    "Dataset",
    "load_dataset",
    "Normalisation",
    "read_normalise",
    "DatasetBatches",
    "to_batches",
    "resolve_data",
    "FAMILIES",
    "network_for",
    "initialise",
    "TrainSettings",
    "TrainResult",
    "EpochRecord",
    "train",
    "derive_seed",
    "compare",
    "Comparison",
    "run_demo",
    "DemoSettings",
    "DemoResult",
    "StudyError",
    "can_stack",
    "train_stacked",
    "preset_names",
    "preset_text",
    "read_study",
    "StudyConfig",
    "DataConfig",
    "NetworkConfig",
    "TrainingConfig",
    "MeasureConfig",
    "Variant",
    "make_plan",
    "StudyPlan",
    "Unit",
    "NetworkRef",
    "check_device",
    "check_continuation",
    "estimate_study",
    "Estimate",
    "run_study",
    "study_status",
    "Progress",
    "StudyStatus",
    "AbstractExecutor",
    "InProcess",
    "LocalProcesses",
    "OnRay",
    "Job",
    "Outcome",
    "export_study",
    "read_rows",
    "read_run",
    "transport_exponent",
    "AbstractSink",
    "Scalar",
    "TensorBoard",
    "WeightsAndBiases",
]

_ENGINE = {
    "_config": (
        "DataConfig",
        "MeasureConfig",
        "NetworkConfig",
        "StudyConfig",
        "TrainingConfig",
        "Variant",
        "preset_names",
        "preset_text",
        "read_study",
    ),
    "_continuation": ("check_continuation",),
    "_estimate": ("Estimate", "estimate_study"),
    "_executors": ("AbstractExecutor", "InProcess", "Job", "LocalProcesses", "OnRay", "Outcome"),
    "_export": ("export_study", "read_rows", "read_run"),
    "_plan": ("NetworkRef", "StudyPlan", "Unit"),
    "_rate": ("transport_exponent",),
    "_runner": ("Progress", "StudyStatus", "make_plan", "run_study", "study_status"),
    "_sinks": ("AbstractSink", "Scalar", "TensorBoard", "WeightsAndBiases"),
}
_HOME = {name: module for module, names in _ENGINE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
