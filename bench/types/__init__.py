"""The types that every other module speaks: encoders, features, data sets, tasks, scores.

Nothing here imports torch at run time: the command line, the plan and the report use these types too.
"""

from .base import Array, DataKind, Frozen, Interpolation, Pooling, PosInterpolation
from .data import Dataset, ImageSplit, VideoSequence, ignored_files, mask_values
from .encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CheckpointInfo,
    Encoder,
    EncoderSpec,
    Features,
    Tap,
    TrainingPoint,
)
from .features import Column, FeatureBank, FeatureRequest, View, pooled_columns
from .tasks import (
    Artefact,
    Context,
    Measurement,
    Metric,
    Progress,
    Score,
    Statistic,
    Step,
    TaskSpec,
    Work,
    mean_statistic,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Array",
    "Artefact",
    "CheckpointInfo",
    "Column",
    "Context",
    "DataKind",
    "Dataset",
    "Encoder",
    "EncoderSpec",
    "FeatureBank",
    "FeatureRequest",
    "Features",
    "Frozen",
    "ImageSplit",
    "Interpolation",
    "Measurement",
    "Metric",
    "Pooling",
    "PosInterpolation",
    "Progress",
    "Score",
    "Statistic",
    "Step",
    "Tap",
    "TaskSpec",
    "TrainingPoint",
    "VideoSequence",
    "View",
    "Work",
    "ignored_files",
    "mask_values",
    "mean_statistic",
    "pooled_columns",
]
