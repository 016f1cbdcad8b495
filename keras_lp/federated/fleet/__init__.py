"""Federations of real machines with Flower."""

from keras_lp.federated.fleet.app import FlowerApp, flower_app

__all__ = ["FlowerApp", "flower_app"]
