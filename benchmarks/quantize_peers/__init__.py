"""Scripts that quantize with one tool each, every tool in an environment of its own."""
