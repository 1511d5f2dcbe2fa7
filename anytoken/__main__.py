"""`python -m anytoken` is the `anytoken` command."""

from anytoken.cli import main

if __name__ == "__main__":
    main()
