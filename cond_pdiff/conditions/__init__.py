"""What a person gives: conditions of several kinds, each in a module of its own, and the register of them."""

from cond_pdiff.conditions import style_image, task_prompt  # noqa: F401  # registers them
