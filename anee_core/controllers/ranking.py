"""Layers in order of importance."""

from __future__ import annotations

from anee_core.errors import PolicyError
from anee_core.interfaces.setting import Setting


def rank_layers(setting: Setting, protected: frozenset[int], policy: str) -> list[int]:
    """Return all layer indices, protected ones first, then by falling calibrated importance.

    Raises:
        PolicyError: the setting carries no calibration, or one of another model.
    """
    if setting.calibration is None:
        raise PolicyError(
            f"{policy}: this policy needs a calibration; load the model with anee.load, or pass "
            "calibration=anee_core.calibration.importance.calibrate(model)"
        )
    importance = setting.calibration.importance.tolist()
    if len(importance) != setting.num_layers:
        raise PolicyError(
            f"{policy}: the calibration is of a model with {len(importance)} layers, "
            f"this one has {setting.num_layers}; calibrate this model"
        )
    return sorted(range(setting.num_layers), key=lambda i: (i not in protected, -importance[i]))
