"""Commands for operators: `entrepot status` shows the state of the server, and `entrepot doctor` looks for problems."""
