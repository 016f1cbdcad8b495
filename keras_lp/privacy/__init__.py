"""Differential privacy: settings, account, noise and clipping, for federations and heads."""
