"""Kernel regression: expression from neighbors and looks, in closed form."""

from stgen.models.kernel_regression.model import KernelRegression

__all__ = ["KernelRegression"]
