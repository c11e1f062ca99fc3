"""`python -m llamba`: the command, where no script of it is on the path."""

from llamba.cli import main

if __name__ == "__main__":
    main()
