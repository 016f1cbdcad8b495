"""Multitask learning: a shared network and a head for each task."""
