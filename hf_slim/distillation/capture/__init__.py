"""Recording what flows through a model in one forward pass: attention states, and inputs of the output layer."""
