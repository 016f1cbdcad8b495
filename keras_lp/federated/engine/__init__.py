"""Rounds in TensorFlow Federated: the worker, blocks of clients, and the client work."""
