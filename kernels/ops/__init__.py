"""Counter-based noise and fused sampler steps: one file per op, torch reference beside the kernel."""
