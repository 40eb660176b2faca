"""Measuring what a model gives away."""

from dpjax.auditing.extraction import completes_secrets

__all__ = ["completes_secrets"]
