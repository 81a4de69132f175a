"""Measurements behind the figures of the docs, and the fault campaign."""
