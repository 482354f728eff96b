"Experiments, their results, sweeps and reports. Written by hand; the modules are exported from nbs/method."

from .experiment import Experiment, run, run_many
from .result import Result, published, summary

__all__ = ["Experiment", "Result", "published", "run", "run_many", "summary"]
