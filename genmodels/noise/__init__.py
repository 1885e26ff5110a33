"""Noise: its laws with their Tweedie formulas, and levels estimated from pictures."""

from genmodels.noise.laws import FLOOR, LAWS, SPREAD, Law, State, law_of, tweedie

__all__ = ["FLOOR", "LAWS", "SPREAD", "Law", "State", "law_of", "tweedie"]
