"""Importance of a sweep's axes: permutation importance of a random forest over its trials.

Shape suffixes: N trials, F features.
"""

from __future__ import annotations

import numpy as np

N_SPLITS, _TREES, _SHUFFLES = 10, 40, 3


def permutation_shares(features_NF: np.ndarray, target_N: np.ndarray, groups: list[str]) -> tuple[float, np.ndarray]:
    """R² on held-out settings, and the rise of the squared error when a feature is shuffled.

    Args:
        features_NF: features of N trials.
        target_N: the metric.
        groups: the setting of each trial; the trials of one setting are never split between training and test.

    Returns:
        R², and the rise in units of the target's variance [splits, F].
    """
    from sklearn.ensemble import RandomForestRegressor  # slow to import
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import GroupShuffleSplit

    errors, shares, variance = [], [], float(target_N.var())
    splits = GroupShuffleSplit(n_splits=N_SPLITS, test_size=0.25, random_state=0).split(features_NF, groups=groups)
    for learned, held_out in splits:
        forest = RandomForestRegressor(_TREES, min_samples_leaf=2, random_state=0)
        forest.fit(features_NF[learned], target_N[learned])
        shuffled = permutation_importance(
            forest,
            features_NF[held_out],
            target_N[held_out],
            scoring="neg_mean_squared_error",
            n_repeats=_SHUFFLES,
            random_state=0,
        )
        errors.append(float(np.mean((forest.predict(features_NF[held_out]) - target_N[held_out]) ** 2)))
        shares.append(shuffled.importances_mean / variance)
    return 1 - float(np.mean(errors)) / variance, np.array(shares)
