"""Experiments of many trainings and evaluations: their jobs, results and pages."""
