"""Training: data, schedules, the loop, and one file per objective."""
