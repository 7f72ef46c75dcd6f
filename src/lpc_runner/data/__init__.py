"""Examples: their sources, their checks, and device-resident batches by (seed, epoch, position)."""
