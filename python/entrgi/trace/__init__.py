"""Traces of denoising: recorded from generations, written and read as lines of JSON. Reading needs no torch."""

from entrgi.trace.reader import TraceError, read
from entrgi.trace.recorder import concatenate, plain_options, record
from entrgi.trace.schema import Result, Run, Trace, TracedPrompt, TraceStep, TrajectoryStep, lines, write

__all__ = [
    "Result",
    "Run",
    "Trace",
    "TraceError",
    "TraceStep",
    "TracedPrompt",
    "TrajectoryStep",
    "concatenate",
    "lines",
    "plain_options",
    "read",
    "record",
    "write",
]
