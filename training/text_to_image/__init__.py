"""A small text-to-image base model, trained from scratch on scenes that code renders: `cond-pdiff/pixart-mini`."""
