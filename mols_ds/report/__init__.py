"""Rendering of the calibration report: files, text table, plot, fixed alphas."""
