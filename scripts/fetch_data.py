"""The same as `lpc-runner fetch`."""

from lpc_runner.fetch import main

if __name__ == "__main__":
    main()
