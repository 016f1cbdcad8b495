"""Runs and trains files on a device, and averages the weights of devices on a server."""
