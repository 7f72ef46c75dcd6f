"""The same as `lpc-runner dashboard`."""

from lpc_runner.dashboard import main

if __name__ == "__main__":
    main()
