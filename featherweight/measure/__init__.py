"""Measurements, their statistics, and the choice of the winner."""
