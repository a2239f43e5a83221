"""The native layer step, in C++ for the CPU."""
