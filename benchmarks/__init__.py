"""Time per Langevin step and per update: Algorithm 1 as written, ours, other packages, a VAE and the floor."""
