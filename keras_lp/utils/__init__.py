"""Shared helpers: checks of single arguments, atomic file writes, similar names, tables."""
