"""The command line: ``graphwright <command>``, one module per command."""
