"""What is measured or fitted once for a model, without training."""

from anee_core.calibration.gate import GateCalibration, calibrate_gate
from anee_core.calibration.importance import CalibrationOptions, calibrate

__all__ = ["CalibrationOptions", "GateCalibration", "calibrate", "calibrate_gate"]
