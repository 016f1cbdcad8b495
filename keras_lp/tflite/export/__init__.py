"""A model becomes a verified file: describe, convert, quantize, verify."""
