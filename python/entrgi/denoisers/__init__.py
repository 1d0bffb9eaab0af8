"""Denoisers: masked tokens in, logits at chosen positions out."""

from entrgi.denoisers.callable import CallableDenoiser
from entrgi.denoisers.dream import DreamDenoiser
from entrgi.denoisers.llada import LLaDADenoiser
from entrgi.denoisers.loading import load_denoiser
from entrgi.denoisers.masked_lm import MaskedLM
from entrgi.denoisers.protocol import Denoiser

__all__ = ["CallableDenoiser", "Denoiser", "DreamDenoiser", "LLaDADenoiser", "MaskedLM", "load_denoiser"]
