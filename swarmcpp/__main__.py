"""`python -m swarmcpp` is the `swarmcpp` command."""

from swarmcpp.cli import main

if __name__ == "__main__":
    main()
