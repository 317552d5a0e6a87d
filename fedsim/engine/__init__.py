"""Gradients of a stack of clients: engines, and the rule that chooses one."""
