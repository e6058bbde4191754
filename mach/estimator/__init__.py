"""MACH by scikit-learn's rules, over rows in memory."""
