"""Published results run again: a function for each, a page and figures in docs/reproductions/."""
