"""Where the time of a guided generation goes, part by part, against the least it could take."""

from entrgi.profile.profiler import Part, Profile, StepProfile, profile
from entrgi.profile.rates import Rates, measure_rates

__all__ = ["Part", "Profile", "Rates", "StepProfile", "measure_rates", "profile"]
