"""Configurations of the lab."""
