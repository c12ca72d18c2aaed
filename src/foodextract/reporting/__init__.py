"""Results → tables, figures and cards."""
