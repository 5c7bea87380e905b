"""The device side of slimpi: what runs on the Pi. Never imports pipeline, torch or transformers."""
