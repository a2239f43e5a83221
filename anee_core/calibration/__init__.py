"""What is measured or fitted once for a model, without training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anee_core.calibration.options import CalibrationOptions, FitOptions, GateCalibration

if TYPE_CHECKING:
    from anee_core.calibration.gate import calibrate_gate
    from anee_core.calibration.importance import calibrate

__all__ = ["CalibrationOptions", "FitOptions", "GateCalibration", "calibrate", "calibrate_gate"]

# Options are read by a command line, which does not wait for torch.
_WHERE = {"calibrate": "anee_core.calibration.importance", "calibrate_gate": "anee_core.calibration.gate"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
