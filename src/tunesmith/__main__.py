"""`python -m tunesmith`: the command line, in the form that accelerate and torchrun launch."""

from tunesmith.cli import main

main()
