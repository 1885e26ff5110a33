"""Counter-based noise and fused sampler steps, one file per op: reference, then kernel."""
