"""The model-agnostic core of ANEE: interfaces, engine, cache, policies, accounting and the plugin manager."""
