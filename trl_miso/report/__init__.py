"""How much attention the answers of a model give to each constraint, before and after training, and under several contexts."""

from trl_miso.report.measure import Measurement, measure
from trl_miso.report.samples import Sample, Sampler

__all__ = ["Measurement", "Sample", "Sampler", "measure"]
