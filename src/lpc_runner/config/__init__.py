"""From the command line to checked objects; the only place besides main that knows Hydra."""
