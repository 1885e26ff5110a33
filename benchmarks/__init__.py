"""Commands that measure: each makes the numbers it prints, with seed, machine and versions."""
