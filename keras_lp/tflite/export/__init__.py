"""Exports a model to a verified file: convert, quantize, verify."""
