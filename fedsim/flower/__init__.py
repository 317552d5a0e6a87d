"""Running on real devices: the fleet over a Flower grid, and what travels there."""
