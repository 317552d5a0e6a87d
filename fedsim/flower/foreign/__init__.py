"""An unmodified Flower app on our clock: its files, its nodes, and the grid that its ServerApp is given."""
