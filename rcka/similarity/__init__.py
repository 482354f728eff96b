"""Similarity measures, the bounds that follow from them, and estimators that stream. Written by hand; the modules are
exported from nbs/theory."""

from .measures import *  # noqa: F403
