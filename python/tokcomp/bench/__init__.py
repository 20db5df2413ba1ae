"""Measuring compressed models: the published pipelines to compare with, timing, provenance, `tokcomp bench`."""
