"""Ground floor: the large model behind a server, and the values that pass between the rooms."""
