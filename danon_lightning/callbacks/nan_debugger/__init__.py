"""Finds where a NaN or an infinity came from: the operation, the module, the parameter, the sample."""
