"""`python -m dstill`."""

from dstill.cli.main import main

if __name__ == "__main__":
    main()
