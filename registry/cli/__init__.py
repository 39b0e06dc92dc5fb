"""The command line: the command `entrepot` with its subcommands."""
