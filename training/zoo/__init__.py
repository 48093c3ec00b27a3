"""A zoo: its folder, how it is collected, its adapters as one matrix."""
