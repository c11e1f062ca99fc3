"""Trainers, losses, adapters, checkpoints, metrics, and what is measured of layers."""
