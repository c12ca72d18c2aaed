"""Loading checkpoints: precision, quantization, image budget; the bundled ones."""
