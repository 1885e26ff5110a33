"""Noise: its laws with their Tweedie formulas, and levels estimated from pictures."""

from genmodels.noise.laws import FLOOR, LAWS, SPREAD, Law, State, told_law, tweedie

__all__ = ["FLOOR", "LAWS", "SPREAD", "Law", "State", "told_law", "tweedie"]
