"""Rows → checkpoint."""
