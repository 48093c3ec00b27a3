"""Conditions, what a person gives for an adapter: each kind in a module of its own, and the register of the kinds."""

from cond_pdiff.conditions import style_image, task_prompt, vector  # noqa: F401  # registers them
