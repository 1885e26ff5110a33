"""Training: run folders, the fit, what happens around it, and DDO's self-play."""
