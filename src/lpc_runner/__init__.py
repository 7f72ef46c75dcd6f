"""Langevin predictive coding: train deep latent Gaussian models by sampling their posterior."""

__version__ = "0.1.0"
