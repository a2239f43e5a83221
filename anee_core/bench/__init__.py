"""Many runs side by side: speed, sweeps over budgets, and the records of both."""
