"""The native layer step, in C++ for the CPU."""

from __future__ import annotations
