"""`python -m fedsim`, which is what torchrun wants: the same as the command `fedsim`."""

from fedsim.cli import main

main()
