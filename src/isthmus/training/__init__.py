"""Training: data sets by name, networks sized to them, and training that a seed determines."""

from isthmus.training._augment import Augmentation
from isthmus.training._dataset import Dataset, DatasetBatches, Described, Outline, to_batches
from isthmus.training._datasets import DATASETS, SPLITS, load_dataset, outline
from isthmus.training._fetch import OnProgress
from isthmus.training._initialise import Initialisation, initialise
from isthmus.training._memory import check_fits
from isthmus.training._networks import (
    FAMILIES,
    MOST_LAYERS,
    network_for,
    operations,
    parameters_of,
)
from isthmus.training._normalise import Normalisation, read_normalise
from isthmus.training._precision import Precision, PrecisionSetting, faster_precision
from isthmus.training._resolve import resolve_data
from isthmus.training._seeds import derive_seed
from isthmus.training._stacked import can_stack, train_stacked
from isthmus.training._training import (
    EpochRecord,
    Optimiser,
    RateSchedule,
    TrainResult,
    TrainSettings,
    train,
)

__all__ = [
    "Described",
    "Outline",
    "outline",
    "DATASETS",
    "FAMILIES",
    "MOST_LAYERS",
    "SPLITS",
    "Augmentation",
    "Dataset",
    "DatasetBatches",
    "EpochRecord",
    "Initialisation",
    "Normalisation",
    "OnProgress",
    "Optimiser",
    "Precision",
    "PrecisionSetting",
    "RateSchedule",
    "TrainResult",
    "TrainSettings",
    "can_stack",
    "check_fits",
    "derive_seed",
    "faster_precision",
    "initialise",
    "load_dataset",
    "network_for",
    "operations",
    "parameters_of",
    "read_normalise",
    "resolve_data",
    "to_batches",
    "train",
    "train_stacked",
]
