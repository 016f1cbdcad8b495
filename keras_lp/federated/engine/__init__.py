"""Rounds in TensorFlow Federated: the worker, the blocks, what runs on a client."""
