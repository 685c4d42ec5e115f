"""`python -m smedjan`: the command line where the script is not on PATH."""

from smedjan.cli import main

if __name__ == "__main__":
    main()
