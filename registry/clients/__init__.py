"""How clients of this registry are set up: its address as they reach it, and their files and commands."""
