"""Trying candidates on tensors: what each takes, what it is predicted to cost, and for some what it does cost."""

from tenpak.profiling.candidates import DEFAULT_CANDIDATES, Candidates, fixed_by, observed
from tenpak.profiling.run import profile
from tenpak.profiling.tries import profiled

__all__ = ["DEFAULT_CANDIDATES", "Candidates", "fixed_by", "observed", "profile", "profiled"]
