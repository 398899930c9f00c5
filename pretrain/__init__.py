"""Training of the checkpoints that the benchmark scores: objectives, and one loop that trains them."""
