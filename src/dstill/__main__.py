"""`python -m dstill`."""

from dstill.cli import main

if __name__ == "__main__":
    main()
