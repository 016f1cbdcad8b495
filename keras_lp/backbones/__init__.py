"""Turns a name, a file or a model into a headless network, and freezes it as requested."""
