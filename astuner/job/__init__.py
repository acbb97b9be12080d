"""The Python face of astuner: describe a job, tune it, use the tuned model."""

from astuner.job.job import AstunerJob
from astuner.job.tuned_model import TunedModel

__all__ = ["AstunerJob", "TunedModel"]
