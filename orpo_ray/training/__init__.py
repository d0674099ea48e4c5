"""One trial: loss, loop, engine and checkpoints. Needs no Ray."""
