"""Small sets of numbers that come with scikit-learn: no download."""

from __future__ import annotations

from dataclasses import replace

from fedsim.data.arrays import from_arrays
from fedsim.data.dataset import Dataset


def diabetes() -> Dataset:
    """442 patients, ten measurements each, and how their diabetes went on after a year: a number to predict.

    Efron, Hastie, Johnstone, Tibshirani. Least Angle Regression. Annals of Statistics 32 (2004). Bundled with
    scikit-learn. Measurements have mean 0 and deviation 1 over all patients, the target is in hundreds. A fifth is held
    out, the same rows in every run.
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    data = from_arrays((x - x.mean(0)) / x.std(0), y / 100, origin="diabetes")
    return replace(data, notes=("Measurements were standardised, the target divided by 100.",))
