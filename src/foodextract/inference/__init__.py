"""Images → records."""
