"""Exports models to files that train on the device."""
