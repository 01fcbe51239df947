"""Calibration: alpha, margin and filter chosen on hold-out rows, out of log-probabilities scored once."""
