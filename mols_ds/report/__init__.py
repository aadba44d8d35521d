"""Output of a calibration report: files, text table, plot, fixed alphas, export."""
