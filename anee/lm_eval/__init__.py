"""ANEE models for lm-eval, and the tasks that it can score without a hub."""
