"""Language models, the forward pass with a shared prompt, and log-probabilities."""
