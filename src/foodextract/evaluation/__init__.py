"""Answers against labels: scores, metrics with intervals, and the results format."""
