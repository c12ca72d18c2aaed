"""What a label can do wrong, and how it is mended."""
