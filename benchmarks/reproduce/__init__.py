"""Published results run again: one command each, a page under docs/reproductions with what appears and what not."""
