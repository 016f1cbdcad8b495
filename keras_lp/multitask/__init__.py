"""Multitask learning: a shared network with one head per task."""
