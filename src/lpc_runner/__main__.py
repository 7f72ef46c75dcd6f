from lpc_runner.main import main

main()
