"""Every error that tenpak raises on purpose, as one tree.

::

    TenpakError
    ├ CheckpointError    MissingTensorError, UnsupportedDtypeError, UnsafeCheckpointError
    ├ CalibrationError   MissingStatisticsError, SingularHessianError
    ├ CodecError         UnknownCodecError (LookupError), UnsupportedShapeError, InvalidPayloadError,
    │                    RecipeError (ValueError)
    ├ AllocationError    BudgetError (ValueError), InfeasibleBudgetError (ValueError)
    ├ ArtifactError      FormatVersionError, CorruptArtifactError, OutputExistsError
    └ EvaluationError

A message says what failed and on which tensor or file; ``hint`` says what to do next. The command line prints both
in one line each and exits non-zero.
"""

from __future__ import annotations

__all__ = [
    "AllocationError",
    "ArtifactError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CodecError",
    "CorruptArtifactError",
    "EvaluationError",
    "FormatVersionError",
    "InfeasibleBudgetError",
    "InvalidPayloadError",
    "MissingStatisticsError",
    "MissingTensorError",
    "OutputExistsError",
    "RecipeError",
    "SingularHessianError",
    "TenpakError",
    "UnknownCodecError",
    "UnsafeCheckpointError",
    "UnsupportedDtypeError",
    "UnsupportedShapeError",
]


class TenpakError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what failed, naming the tensor or file.
        hint: what the user can do about it, or None where nothing but the message helps.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(TenpakError):
    """The source model cannot be read or is not a decoder-only language model."""


class MissingTensorError(CheckpointError):
    """A tensor that the model needs is not in the checkpoint."""


class UnsupportedDtypeError(CheckpointError):
    """A tensor is stored in a dtype that tenpak does not read."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the checkpoint would run code from it."""


class CalibrationError(TenpakError):
    """A calibration or evaluation text cannot be used, or what calibration found does not suffice."""


class MissingStatisticsError(CalibrationError):
    """A codec or rounding needs statistics that are not there."""


class SingularHessianError(CalibrationError):
    """A Hessian cannot be factored, however much it is damped."""


class CodecError(TenpakError):
    """A weight cannot be encoded or a codec is misused."""


class UnknownCodecError(CodecError, LookupError):
    """No codec of this id is registered."""


class UnsupportedShapeError(CodecError):
    """The codec does not accept a weight of this shape."""


class InvalidPayloadError(CodecError):
    """A payload does not match what its codec configuration and shape imply."""


class RecipeError(CodecError, ValueError):
    """A recipe string or JSON cannot be understood, or a value in it is out of range."""


class AllocationError(TenpakError):
    """A budget cannot be used."""


class BudgetError(AllocationError, ValueError):
    """A budget cannot be understood."""


class InfeasibleBudgetError(AllocationError, ValueError):
    """No artifact of this model meets the budget; the message states the nearest that does."""


class ArtifactError(TenpakError):
    """An artifact cannot be written or read."""


class FormatVersionError(ArtifactError):
    """The artifact was written by a version of the format that this version does not read."""


class CorruptArtifactError(ArtifactError):
    """The bytes of the artifact are not those that were written, or contradict each other."""


class OutputExistsError(ArtifactError):
    """The output folder exists and may not be replaced."""


class EvaluationError(TenpakError):
    """Original and artifact cannot be compared on this text."""
