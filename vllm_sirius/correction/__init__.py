"""How the target's correction pass runs: its dense linear layers on the few tokens between two corrections."""
