"""Balancing methods for the tasks of a multitask model."""

from keras_lp.balancing.ways import (
    DWA,
    IMTLG,
    MGDA,
    Balancing,
    CAGrad,
    GradNorm,
    PCGrad,
    Uncertainty,
)

__all__ = [
    "DWA",
    "IMTLG",
    "MGDA",
    "Balancing",
    "CAGrad",
    "GradNorm",
    "PCGrad",
    "Uncertainty",
]
