"""The experiment file: its sections, its search space, and the rules that hold between them."""
