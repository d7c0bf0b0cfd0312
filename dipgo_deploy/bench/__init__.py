"""Measurements of a user's own models and schedules."""
