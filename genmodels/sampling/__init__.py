"""Samplers: pure functions of a callable, a state and a schedule."""
