"""Sparse training and pruning: masks, schedules, iso-FLOP layers, smaller networks."""
