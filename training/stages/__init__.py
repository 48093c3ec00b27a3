"""Training stages of a generator, and the loop that runs each of them."""
