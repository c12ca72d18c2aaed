"""Predictions against labels: scores, metrics with intervals, provenance, and the results format."""
